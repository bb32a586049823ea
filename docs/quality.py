"""Regenerates what README and the model card show of the embedded weights: the PSNR tables and the picture.

    python docs/quality.py ../shared/images

The folder holds Set5/ and Set14/ (of which whatever images are there are listed one by one). Tables go between the
marks <!-- quality --> and <!-- /quality -->, the picture to docs/images/result.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import fastsr

DOCS = Path(__file__).parent
HEAD = "| images | scale | bicubic, PSNR / SSIM | carn_m, PSNR / SSIM | gain, dB |\n|---|---|---|---|---|\n"
SCALES = (2, 3, 4)


def row(images: str, scale: int, figures: dict) -> str:
    bicubic = figures["bicubic"]
    gain = figures["psnr_y"] - bicubic["psnr_y"]
    pair = [f"{f['psnr_y']:.2f} / {f['ssim_y']:.4f}" for f in (bicubic, figures)]
    return f"| {images} | x{scale} | {pair[0]} | {pair[1]} | +{gain:.2f} |\n"


def replace(file: Path, table: str) -> None:
    before, begin, rest = file.read_text().partition("<!-- quality -->\n")
    _, end, after = rest.partition("<!-- /quality -->")
    if not end:
        raise SystemExit(f"{file} has no <!-- quality --> ... <!-- /quality -->")
    file.write_text(before + begin + "\n" + HEAD + table + "\n" + end + after)


def picture(source: Path, target: Path, scale: int = 4) -> None:
    """Bicubic on the left, the embedded network on the right."""
    small = Image.open(source)
    size = (small.width * scale, small.height * scale)
    pair = [small.resize(size, Image.Resampling.BICUBIC), fastsr.upscale(small, scale=scale)]
    Image.fromarray(np.concatenate([np.asarray(p) for p in pair], 1)).save(target, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", type=Path, help="the folder that holds Set5/ and Set14/")
    images = parser.parse_args().images
    set5 = {scale: fastsr.evaluate("carn_m", images / "Set5", scale=scale)["mean"] for scale in SCALES}
    set14 = {scale: fastsr.evaluate("carn_m", images / "Set14", scale=scale)["images"] for scale in SCALES}
    means = "".join(row("Set5, mean of 5", scale, set5[scale]) for scale in SCALES)
    singles = "".join(
        row(Path(name).stem, scale, set14[scale][name]) for name in sorted(set14[SCALES[0]]) for scale in SCALES
    )
    replace(DOCS.parent / "README.md", means)
    replace(DOCS / "model-card-carn_m.md", means + singles)
    picture(DOCS / "images" / "astronaut.png", DOCS / "images" / "result.png")


if __name__ == "__main__":
    main()
