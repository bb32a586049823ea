"""ZSSR: a small network that learns to enlarge one image from that image alone, and then enlarges it.

Each step shrinks random views of the image ("fathers") to "sons", and the network learns to get from an interpolated
son back to its father; then it is applied to the image itself. This is the procedure of the code published with
A. Shocher, N. Cohen, M. Irani, "Zero-Shot Super-Resolution using Deep Internal Learning", CVPR 2018,
https://github.com/assafshocher/ZSSR, whose defaults are those of `ZSSRConfig`. What differs on purpose: images are
mirrored at all four borders and antialiased axis by axis when resized (`official_resize=True` for the published way),
fathers of images smaller than the crop carry no more black margin than a square needs, and no image is only logged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastsr.image.resize import KERNELS, Kernel, Scale, back_projection, imresize, kernel_shift, pair, scaled_shape
from fastsr.models.zssr import ZSSR
from fastsr.models.zssr import ZSSRConfig as NetworkConfig

STRIP_PIXELS = 1 << 20  # the network sees at most about this many pixels at a time outside training


@dataclass(frozen=True)
class ZSSRConfig:
    """Settings of the whole procedure; the defaults are those of the published code.

    scale_factors: gradual steps as (vertical, horizontal), all relative to the original image, the last being the
        scale asked for; empty for one step. base_change_sfs: those after which the result replaces the image.
    form: "original", or "port" for what the PyTorch port (https://github.com/HarukiYqM/pytorch-ZSSR) does otherwise:
        ReLU in front of the first layer too, its initial weights, squared instead of absolute error, a new Adam at
        every step, and a learning rate that is lowered for the stop criterion only, never for Adam.
    back_projection_iters: one number, or one for each step.
    official_resize: resize as the published code does: no mirroring at the top and left, and the vertical scale alone
        decides whether to antialias.
    Raises ValueError for values that no run could work with.
    """

    scale_factors: tuple[tuple[float, float], ...] = ()
    base_change_sfs: tuple[tuple[float, float], ...] = ()
    form: str = "original"
    width: int = 64
    depth: int = 8
    init_variance: float = 0.1
    learn_residual: bool = True
    init_net_for_each_sf: bool = False
    max_iters: int = 3000
    min_iters: int = 256
    learning_rate: float = 1e-3
    min_learning_rate: float = 9e-6
    learning_rate_change_ratio: float = 1.5
    learning_rate_policy_check_every: int = 60
    learning_rate_slope_range: int = 256
    run_test_every: int = 50
    crop_size: int = 128
    noise_std: float = 0.0
    downscale_method: str = "cubic"
    upscale_method: str = "cubic"
    official_resize: bool = False
    output_flip: bool = True
    back_projection_iters: tuple[int, ...] = (10,)
    augment_leave_as_is_probability: float = 0.05
    augment_no_interpolate_probability: float = 0.45
    augment_min_scale: float = 0.5
    augment_scale_diff_sigma: float = 0.25
    augment_shear_sigma: float = 0.1
    augment_allow_rotation: bool = True

    def __post_init__(self) -> None:
        def need(condition: bool, expectation: str) -> None:
            if not condition:
                raise ValueError(f"ZSSRConfig: expected {expectation}; got {self}")

        need(self.form in ("original", "port"), 'form "original" or "port"')
        need(self.width >= 1 and self.depth >= 3, "width >= 1 and depth >= 3")
        need(self.max_iters >= 1 and self.crop_size >= 4, "max_iters >= 1 and crop_size >= 4")
        need(
            self.run_test_every >= 1 and self.learning_rate_policy_check_every >= 1, "checks at least 1 iteration apart"
        )
        need(
            self.learning_rate_slope_range // self.run_test_every >= 3,
            "learning_rate_slope_range to span at least 3 tests, enough for a line and its error",
        )
        need(self.downscale_method in KERNELS and self.upscale_method in KERNELS, f"methods among {tuple(KERNELS)}")
        need(all(n >= 0 for n in self.back_projection_iters), "back_projection_iters >= 0")
        need(
            len(self.back_projection_iters) in (1, max(1, len(self.scale_factors))),
            "one number of back-projections, or one for each of scale_factors",
        )
        known = [pair(f) for f in self.scale_factors]
        need(all(pair(f) in known for f in self.base_change_sfs), "base_change_sfs among scale_factors")
        need(0 < self.augment_min_scale <= 1, "augment_min_scale in (0, 1]")

    @classmethod
    def gradual(cls) -> ZSSRConfig:
        """x2 in six steps that grow one axis at a time: slower and better on images with fine repeated detail."""
        steps = ((1.0, 1.5), (1.5, 1.0), (1.5, 1.5), (1.5, 2.0), (2.0, 1.5), (2.0, 2.0))
        return cls(scale_factors=steps, back_projection_iters=(6, 6, 8, 10, 10, 12))

    @classmethod
    def kernel(cls) -> ZSSRConfig:
        """For a known blur kernel: it need not be symmetric, so nothing may be flipped or rotated."""
        return cls(output_flip=False, augment_allow_rotation=False, back_projection_iters=(2,))

    @classmethod
    def real(cls) -> ZSSRConfig:
        """For photographs that are noisy, compressed or blurred in an unknown way."""
        return cls(
            output_flip=False,
            back_projection_iters=(0,),
            noise_std=0.0125,
            augment_allow_rotation=False,
            augment_scale_diff_sigma=0.0,
            augment_shear_sigma=0.0,
            augment_min_scale=0.75,
        )


@torch.inference_mode(False)
def zssr(
    image: Tensor,
    scale: Scale,
    *,
    config: ZSSRConfig | None = None,
    kernels: np.ndarray | Sequence[np.ndarray] | None = None,
    seed: int = 0,
    progress: Callable[[dict], None] | None = None,
) -> Tensor:
    """Enlarges image (1, C, H, W), float32 or float64 in 0..1, C = 1 or 3, to (1, C, ceil(H * scale), ceil(W * scale)).

    scale: one number or (vertical, horizontal), at least 1. kernels: the blur with which the image was shrunk from the
    scene, one 2-D array or one for each step, as measured (they are centred here); by default `downscale_method`.
    progress is called after every iteration with step, steps, iteration, max_iters, loss, learning_rate and test_mse,
    the error of restoring the image from its shrunk self when last tested.
    Equal arguments give equal results on one machine; no global random state is read or changed.
    Raises ValueError for arguments that do not fit this.
    """
    config = config or ZSSRConfig()
    _check_image(image)
    if not (image.min() >= 0 and image.max() <= 1):  # so that NaN fails too
        raise ValueError(f"zssr: image: expected values in 0..1, got {image.min():g}..{image.max():g}; clamp it first")
    image = image.detach().clone()  # a caller's inference tensor could not take part in learning
    factors = [pair(f) for f in config.scale_factors] or [pair(scale)]
    if factors[-1] != pair(scale):
        raise ValueError(f"zssr: config.scale_factors: expected the last to be scale={pair(scale)}, got {factors[-1]}")
    if min(min(f) for f in factors) < 1:
        raise ValueError(f"zssr: scale: expected at least 1 along both axes, got {factors}")
    changes = [pair(f) for f in config.base_change_sfs]
    measured = _one_for_each(kernels, len(factors))
    rng = np.random.default_rng(seed)
    learner = None
    base, current = (1.0, 1.0), image
    sources, source_scales = [image], [1.0]
    for step, factor in enumerate(factors):
        relative = (factor[0] / base[0], factor[1] / base[1])
        down = config.downscale_method if measured is None else kernel_shift(measured[step], relative)
        if learner is None or config.init_net_for_each_sf:
            learner = _Learner(image, config, rng)
        learner.learn(current, relative, sources, source_scales, down, (step, len(factors)), progress)
        result = final_test(
            learner.apply,
            current,
            relative,
            shape=scaled_shape(*image.shape[2:], factor),
            kernel=down,
            upscale_method=config.upscale_method,
            output_flip=config.output_flip,
            back_projection_iters=config.back_projection_iters[min(step, len(config.back_projection_iters) - 1)],
            official_resize=config.official_resize,
        )
        sources.append(result)
        source_scales.append(min(factor))
        if factor in changes:
            base, current = factor, result
    return result


@torch.no_grad()
def final_test(
    network: Callable[[Tensor], Tensor],
    image: Tensor,
    scale: Scale,
    *,
    shape: tuple[int, int] | None = None,
    kernel: Kernel = "cubic",
    upscale_method: str = "cubic",
    output_flip: bool = True,
    back_projection_iters: int = 10,
    official_resize: bool = False,
) -> Tensor:
    """The inference half of ZSSR with a given network: (1, C, H, W) in 0..1 -> (1, C, H', W') in 0..1.

    The image is interpolated by `scale` to `shape` (default ceil(size * scale)), given to `network`, which keeps the
    size, and clipped; so are its 8 rotations and mirror images if `output_flip` (the 4 that keep the axes where the
    two scales differ). Each result is turned back and back-projected, the pixelwise median taken and back-projected
    once more. kernel: how the image came from the scene, a name or a 2-D array centred by `kernel_shift`.
    """
    _check_image(image)
    factor = pair(scale)
    height, width = shape or scaled_shape(*image.shape[2:], factor)
    resize = _resize_options(official_resize)

    def project(result: Tensor) -> Tensor:
        for _ in range(back_projection_iters):
            result = back_projection(result, image, factor, down_kernel=kernel, up_kernel=upscale_method, **resize)
        return result

    turns = range(1) if not output_flip else range(8) if factor[0] == factor[1] else range(0, 8, 2)
    variants = []
    for k in turns:
        turned = torch.rot90(image, k, (2, 3))
        turned = turned.flip(3) if k >= 4 else turned
        size = (height, width) if k % 2 == 0 else (width, height)
        enlarged = network(imresize(turned, factor, shape=size, kernel=upscale_method, **resize)).clamp(0, 1)
        enlarged = enlarged.flip(3) if k >= 4 else enlarged
        variants.append(project(torch.rot90(enlarged, -k, (2, 3))))
    return project(_median(variants))


def _median(images: list[Tensor]) -> Tensor:
    """Pixel by pixel; of an even number, the mean of the two in the middle. Sorts the images, which needs no more
    memory than they do."""
    for end in range(len(images) - 1, 0, -1):
        for i in range(end):
            images[i], images[i + 1] = images[i].minimum(images[i + 1]), images[i].maximum(images[i + 1])
    return (images[(len(images) - 1) // 2] + images[len(images) // 2]) / 2


def random_father(
    sources: Sequence[Tensor], scales: Sequence[float], config: ZSSRConfig, rng: np.random.Generator
) -> Tensor:
    """A random square view (1, C, S, S) of one of the sources, clipped to 0..1.

    sources: images (1, C, H, W) of one scene; scales: how much larger than the first each is. S is `crop_size`, or
    the longer side of the source where that is less. Either as it is, or turned and mirrored, or under a random
    affine map; what lies outside the source is black.
    """
    mode = rng.uniform()
    as_is = mode < config.augment_leave_as_is_probability
    affine = mode >= config.augment_leave_as_is_probability + config.augment_no_interpolate_probability
    s = 1.0 if as_is else rng.uniform(config.augment_min_scale, max(scales))
    chosen = next(i for i, have in enumerate(scales) if have >= s - 1e-6)
    source = sources[chosen]
    s = s / scales[chosen] if affine else 1.0  # elsewhere it only chose the source
    height, width = source.shape[2:]
    size = min(config.crop_size, max(height, width))
    centre = np.array([width / 2, height / 2])
    offset = rng.uniform(size=2) * np.maximum(0, s * np.array([width, height]) - size)
    zoom, shear, angle = np.ones(2), np.zeros(2), 0.0
    if affine:
        difference = rng.normal() * config.augment_scale_diff_sigma
        zoom = np.array([s + difference / 2, s - difference / 2])
        shear = rng.normal(size=2) * config.augment_shear_sigma
        angle = rng.uniform(0, 2 * math.pi)
    else:
        centre, offset = np.rint(centre), np.rint(offset)
        angle = rng.integers(4) * math.pi / 2
    if as_is or not config.augment_allow_rotation:
        angle = 0.0
    elif rng.uniform() < 0.5:
        zoom[0] = -zoom[0]
    turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix = np.array([[1.0, shear[0]], [shear[1], 1.0]]) @ turn @ np.diag(zoom)
    return _warp(source, matrix, centre - offset - matrix @ centre, size).clamp_(0, 1)


def _warp(image: Tensor, matrix: np.ndarray, shift: np.ndarray, size: int) -> Tensor:
    """(1, C, size, size): the image moved by (x, y) -> matrix @ (x, y) + shift, pixel centres at integers.

    Bicubic with a = -3/4, which is what both OpenCV and grid_sample call so; zero outside the image, no antialiasing.
    """
    back = np.linalg.inv(matrix)
    height, width = image.shape[2:]
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    points = np.stack((x - shift[0], y - shift[1]), axis=-1) @ back.T
    grid = torch.from_numpy((2 * points + 1) / (width, height) - 1).to(image)  # -1 and 1: the outer edges of the image
    return F.grid_sample(image, grid[None], mode="bicubic", padding_mode="zeros", align_corners=False)


class LearningRate:
    """The rate of one step: divided by 10 whenever the test error has stopped to fall clearly.

    A line is fitted to the last test errors; it does not clearly fall if -ratio * slope < the slope's standard
    deviation. That comes from `numpy.polyfit`, which divides the squared residual by n - 2 (before NumPy 1.16 by
    n - 4, which cut the rate earlier).
    """

    def __init__(self, config: ZSSRConfig) -> None:
        self.config = config
        self.value = config.learning_rate
        self.last_change = 0
        self.errors: list[float] = []

    def update(self, iteration: int) -> None:
        c = self.config
        points = c.learning_rate_slope_range // c.run_test_every
        due = (iteration + 1) % c.learning_rate_policy_check_every == 0 and iteration - self.last_change > c.min_iters
        if not due or len(self.errors) < points:
            return
        tested_at = np.arange(len(self.errors)) * c.run_test_every
        line, covariance = np.polyfit(tested_at[-points:], self.errors[-points:], 1, cov=True)
        if -c.learning_rate_change_ratio * line[0] < math.sqrt(covariance[0, 0]):
            self.value /= 10
            self.last_change = iteration

    @property
    def finished(self) -> bool:
        return self.value < self.config.min_learning_rate


class _Learner:
    """The network of one run, its optimiser and its random numbers."""

    def __init__(self, image: Tensor, config: ZSSRConfig, rng: np.random.Generator) -> None:
        self.config, self.rng = config, rng
        self.network = untrained(image.shape[1], config, rng).to(image)
        self.network.to(memory_format=torch.channels_last)  # 1.25 times as fast to train on a CPU
        self.optimizer: torch.optim.Adam | None = None

    def learn(
        self,
        image: Tensor,
        factor: tuple[float, float],
        sources: Sequence[Tensor],
        scales: Sequence[float],
        kernel: Kernel,
        step: tuple[int, int],
        progress: Callable[[dict], None] | None,
    ) -> None:
        c = self.config
        rate = LearningRate(c)
        if self.optimizer is None or c.form == "port":
            self.optimizer = torch.optim.Adam(self.network.parameters(), lr=rate.value)
        distance = F.l1_loss if c.form == "original" else F.mse_loss
        for iteration in range(c.max_iters):
            father = random_father(sources, scales, c, self.rng)
            son = self.shrink(father, factor, kernel)
            with torch.enable_grad():
                loss = distance(self.train_forward(self.enlarge(son, factor, father)), father)
                self.optimizer.zero_grad()
                loss.backward()
            if c.form == "original":
                for group in self.optimizer.param_groups:
                    group["lr"] = rate.value
            self.optimizer.step()
            if iteration % c.run_test_every == 0:
                restored = self.apply(self.enlarge(self.shrink(image, factor, kernel), factor, image)).clamp(0, 1)
                rate.errors.append(F.mse_loss(restored, image).item())
            rate.update(iteration)
            if progress is not None:
                progress(
                    {
                        "step": step[0],
                        "steps": step[1],
                        "iteration": iteration,
                        "max_iters": c.max_iters,
                        "loss": loss.item(),
                        "learning_rate": rate.value,
                        "test_mse": rate.errors[-1],
                    }
                )
            if rate.finished:
                break

    def shrink(self, image: Tensor, factor: tuple[float, float], kernel: Kernel) -> Tensor:
        inverse = (1 / factor[0], 1 / factor[1])
        son = imresize(image, inverse, kernel=kernel, **_resize_options(self.config.official_resize))
        if self.config.noise_std > 0:
            noise = self.rng.normal(size=tuple(son.shape)) * self.config.noise_std
            son = son + torch.from_numpy(noise).to(son)
        return son.clamp(0, 1)

    def enlarge(self, son: Tensor, factor: tuple[float, float], like: Tensor) -> Tensor:
        options = _resize_options(self.config.official_resize)
        return imresize(son, factor, shape=tuple(like.shape[2:]), kernel=self.config.upscale_method, **options)

    def train_forward(self, x: Tensor) -> Tensor:
        """What `self.network` computes, by torch's own operators: ours compute every layer again to differentiate it,
        which makes an iteration 1.4 times as long."""
        y = x = F.relu(x) if self.network.config.relu_input else x
        *hidden, last = (w.contiguous(memory_format=torch.channels_last) for w in self.network.parameters())
        y = y.contiguous(memory_format=torch.channels_last)
        for weight in hidden:
            y = F.relu(F.conv2d(y, weight, padding=1))
        y = F.conv2d(y, last, padding=1)
        return x + y if self.network.config.residual else y

    @torch.no_grad()
    def apply(self, x: Tensor) -> Tensor:
        """The network on an image of any size, in strips of rows that overlap by its reach: the same result."""
        height, width = x.shape[2:]
        reach, rows = self.config.depth, max(1, STRIP_PIXELS // width)
        if height <= rows:
            return self.network(x)
        strips = []
        for top in range(0, height, rows):
            start, stop = max(0, top - reach), min(height, top + rows + reach)
            strips.append(self.network(x[:, :, start:stop])[:, :, top - start : top - start + rows])
        return torch.cat(strips, dim=2)


def untrained(channels: int, config: ZSSRConfig, rng: np.random.Generator) -> ZSSR:
    """A network for images of `channels` channels, its weights drawn from rng as the form of the config has it."""
    port = config.form == "port"
    shape = NetworkConfig(channels, config.width, config.depth, config.learn_residual, relu_input=port)
    with torch.device("meta"):  # where torch's own initialisation leaves the global random state alone
        network = ZSSR(shape)
    network = network.to_empty(device="cpu").double()
    for weight in network.parameters():
        outputs, inputs = weight.shape[:2]
        variance = 2 / (9 * outputs) if port else config.init_variance / (9 * inputs)
        weight.data.copy_(torch.from_numpy(rng.normal(size=tuple(weight.shape)) * math.sqrt(variance)))
    return network


def _resize_options(official: bool) -> dict:
    return {"antialias": "vertical", "border": "mirror_end"} if official else {}


def _one_for_each(kernels: np.ndarray | Sequence[np.ndarray] | None, steps: int) -> list[np.ndarray] | None:
    if kernels is None:
        return None
    alone = getattr(kernels, "ndim", 0) == 2
    kernels = [np.asarray(kernels)] * steps if alone else [np.asarray(k) for k in kernels]
    if len(kernels) != steps:
        raise ValueError(f"zssr: kernels: expected one 2-D array or {steps}, one for each step; got {len(kernels)}")
    return kernels


def _check_image(image: Tensor) -> None:
    fits = image.dim() == 4 and image.shape[0] == 1 and image.shape[1] in (1, 3) and min(image.shape[2:]) > 0
    if not fits or image.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"zssr: image: expected float32 or float64 (1, C, H, W) with C = 1 or 3, in 0..1; "
            f"got {image.dtype} {tuple(image.shape)}"
        )
