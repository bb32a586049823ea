"""Recipes in bands of rows, so that large maps between the convolutions of an operator never exist as a whole.

Of each band every convolution is given the rows that are needed of its result, and those around that it reads; beyond
these it finds zeros. What that spoils is at the edge of its result and is not read. So neighbouring bands compute some
rows twice: the larger the bands, the fewer. They are as large as LIMIT allows, but eight times what is added around.
How many there are depends on one image's size alone, as bits must not depend on the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from fastsr.recipes import Conv, Copy, Recipe, Step, View

LIMIT = 64 << 20  # bytes of float32 that a map of an image between the convolutions of a recipe may take
LEAST = 8  # rows of a band for each row added around it

Span = tuple[int, int]  # of rows: the first and the end


def banded(recipe: Recipe, limit: int = LIMIT, least: int = LEAST) -> Recipe:
    """The recipe, or if one of its maps takes more than `limit` bytes and it can be cut, one that makes its result band
    by band."""
    inner = [math.prod(shape[1:]) for name, shape in recipe.workspace.items() if name != recipe.output]
    bands = math.ceil(4 * max(inner, default=0) / limit)
    if bands < 2 or not all(_can_be_cut(step) for step in recipe.steps):
        return recipe
    height = recipe.workspace[recipe.output][2]
    around = max(made[1] - height // 2 - 1 for _, _, made in _spans(recipe, (height // 2, height // 2 + 1)))
    rows = max(math.ceil(height / bands), least * around)
    rows = math.ceil(height / math.ceil(height / rows))  # as many in each, so that all are computed by the same forms
    workspace, steps = {recipe.output: recipe.workspace[recipe.output]}, []
    for first in range(0, height, rows):
        band = _Band(recipe, (first, min(first + rows, height)))
        workspace |= band.workspace
        steps += band.steps
    return Recipe(recipe.inputs, workspace, tuple(steps), recipe.output)


def _can_be_cut(step: Step) -> bool:
    """Whether it is a convolution that keeps the size, but for upsampling and shuffles, of rows that are near."""
    return (
        isinstance(step, Conv)
        and step.stride == 1
        and not step.transposed
        and step.weight.shape[-2] == step.weight.shape[-1] == 2 * step.padding + 1
        and step.scale is None
        and step.sums is None
        and all(view.rows is None and view.columns is None for view in (*step.sources, *_beside(step), step.store))
    )


def _beside(step: Conv) -> tuple[View, ...]:
    """The maps of the result's size that it reads."""
    skip = step.skip if isinstance(step.skip, tuple) else () if step.skip is None else (step.skip,)
    return (*skip, *(step.modulate or ()), *(() if step.outer is None else (step.outer,)))


def _spans(recipe: Recipe, span: Span) -> Iterator[tuple[Conv, Span, Span]]:
    """For rows `span` of the output, each convolution, the last first: the rows it reads of its sources, and those it
    makes of them, counted in its result."""
    heights = {name: shape[2] for name, shape in recipe.workspace.items()}
    heights |= {name: x.shape[2] for name, x in recipe.inputs.items() if x.dim() == 4}
    needed = [(View(recipe.output), span)]
    for step in reversed(recipe.steps):
        assert isinstance(step, Conv)
        wanted = [rows for view, rows in needed if _overlap(view, step.store)]
        low, high = min(rows[0] for rows in wanted), max(rows[1] for rows in wanted)
        low, high = low // step.shuffle - step.padding, -(-high // step.shuffle) + step.padding
        read = max(0, low // step.upsample), min(heights[step.sources[0].buffer], -(-high // step.upsample))
        made = read[0] * step.upsample * step.shuffle, read[1] * step.upsample * step.shuffle
        needed += [*((view, read) for view in step.sources), *((view, made) for view in _beside(step))]
        yield step, read, made


def _overlap(a: View, b: View) -> bool:
    ends = [math.inf if view.channels is None else view.start + view.channels for view in (a, b)]
    return a.buffer == b.buffer and a.start < ends[1] and b.start < ends[0]


@dataclass
class _Band:
    """The steps that make rows `span` of a recipe's output, and their workspace."""

    recipe: Recipe
    span: Span

    def __post_init__(self) -> None:
        spans = list(_spans(self.recipe, self.span))[::-1]
        self.held: dict[str, Span] = {}  # of each buffer the rows that the band's own has
        for step, _, made in spans:
            first, end = self.held.get(step.store.buffer, made)
            self.held[step.store.buffer] = min(first, made[0]), max(end, made[1])
        output = self.recipe.output
        read = any(view.buffer == output for step, _, _ in spans for view in (*step.sources, *_beside(step)))
        if not read and self.held[output] == self.span:
            del self.held[output]  # it is stored where it belongs
        self.workspace = {}
        for name, (first, end) in self.held.items():
            n, channels, _, width = self.recipe.workspace[name]
            self.workspace[self._name(name)] = (n, channels, end - first, width)
        self.steps: list[Step] = [self._conv(*each) for each in spans]
        if output in self.held:
            self.steps.append(Copy(self._cut(View(output), self.span), View(output, rows=self.span)))

    def _name(self, buffer: str) -> str:
        return f"{buffer} from {self.span[0]}"

    def _cut(self, view: View, rows: Span) -> View:
        if view.buffer not in self.held:
            return replace(view, rows=rows)
        first = self.held[view.buffer][0]
        return replace(view, buffer=self._name(view.buffer), rows=(rows[0] - first, rows[1] - first))

    def _conv(self, step: Conv, read: Span, made: Span) -> Conv:
        return replace(
            step,
            sources=tuple(self._cut(view, read) for view in step.sources),
            store=self._cut(step.store, made),
            skip=tuple(self._cut(v, made) for v in step.skip) if isinstance(step.skip, tuple)
            else None if step.skip is None else self._cut(step.skip, made),
            modulate=None if step.modulate is None
            else (self._cut(step.modulate[0], made), self._cut(step.modulate[1], made)),
            outer=None if step.outer is None else self._cut(step.outer, made),
        )  # fmt: skip
