"""Directions that were calibrated by probing: some tensors matter more than others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from costbp.estimators.directions import Directions, Part, Probe, Source, independent
from costbp.meter import counted
from costbp.objective import Key, Objective, Piece
from costbp.theory.variance import extreme_of_squares

LIMIT = 10.0  # largest ratio of two groups' scales: a probe of few directions can be near zero
PROBES = -1  # sub-key of the probes, apart from the directions' own


@dataclass
class Calibrated(Source):
    """Gaussian directions whose scale differs by group of consecutive trainable tensors.

    At step 0 and every ``every`` steps after (only at step 0 if None), ``candidates`` directions
    confined to each group are probed; every probe costs a derivative.

    ``use: scale``: z = s_j u on group j and z' = u / s_j, with s_j^2 proportional to
    sqrt(d_j) / |g_j|, where |g_j| is the root mean square of the group's probes. Unbiased for any
    s, and these minimise S = |s g|^2 sum_j(d_j / s_j^2) / |g|^2 + 2; at the minimum that is
    (sum_j |g_j| sqrt(d_j))^2 / |g|^2 + 2 <= d + 2 (Cauchy-Schwarz; our derivation).

    ``use: largest`` or ``smallest``: the calibrating step itself takes from each group the
    candidate with the largest (smallest) absolute derivative, z' = z / c with c the expectation of
    the largest (smallest) of that many chi-squared variables; other steps are plain. The study's
    code does so once, at the first step, in pairs of tensors, keeping the smallest of four
    (without c).
    """

    candidates: int
    group: int
    every: int | None
    use: Literal["scale", "largest", "smallest"]
    scales: Tensor | None = field(default=None, init=False)
    kept: Tensor | None = field(default=None, init=False)
    key: Key | None = field(default=None, init=False)  # of the last calibration

    @property
    def cycle(self) -> int:
        return self.every or 1

    def phase(self, step: int) -> int:
        return int(step == 0 if self.every is None else step % self.every == 0)

    def groups(self, objective: Objective) -> dict[str, int]:
        """Parameter name -> index of its group."""
        return {name: place // self.group for place, name in enumerate(objective.slices)}

    def update(self, objective: Objective, key: Key, probe: Probe) -> None:
        if key == self.key or not (self.phase(key.step) or self.scales is None):
            return
        self.key = key
        group_of = self.groups(objective)
        derivatives = torch.stack(self._probed(objective, key, probe)).nan_to_num(0, 0, 0)
        self.kept = derivatives.abs().argmax(1)
        if self.use == "smallest":
            self.kept = derivatives.abs().argmin(1)
        counts = [0] * len(derivatives)
        for name, (start, stop, _) in objective.slices.items():
            counts[group_of[name]] += stop - start
        sizes = torch.tensor(counts).to(derivatives, non_blocking=True)  # no waiting for the device
        size = derivatives.square().mean(1).sqrt()
        floor = size.max().clamp_min(torch.finfo(size.dtype).tiny)
        variances = sizes.sqrt() / torch.maximum(size, floor / LIMIT**2)
        variances = torch.minimum(variances, variances.min() * LIMIT**2)
        self.scales = (variances * sizes.sum() / (variances * sizes).sum()).sqrt()

    def _probed(self, objective: Objective, key: Key, probe: Probe) -> list[Tensor]:
        """The candidates' derivatives, group by group."""

        def derivatives(group: int) -> Tensor:
            confined = self._confined(objective, key, group)
            return probe(Directions(objective, self.candidates, confined))

        count = 1 + max(self.groups(objective).values())
        if not objective.theta.is_meta or count < 3:
            return [derivatives(group) for group in range(count)]
        with counted(count - 1):  # without numbers, all groups do the same work
            first = derivatives(0)
        return [first, *(first.clone() for _ in range(count - 2)), derivatives(count - 1)]

    def _confined(self, objective: Objective, key: Key, group: int) -> Part:
        part = independent(objective, key.at(PROBES).at(group))
        group_of = self.groups(objective)

        def confined(k: int, piece: Piece) -> Tensor:
            z = part(k, piece)
            return z if group_of[piece.name] == group else z.zero_()

        return confined

    def typical(self, objective: Objective, key: Key, count: int) -> Directions:
        return Directions(objective, count, independent(objective, key))

    def draw(self, objective: Objective, key: Key, count: int) -> Directions:
        plain, group_of = independent(objective, key), self.groups(objective)
        assert self.scales is not None and self.kept is not None
        if self.use == "scale":
            scales = self.scales
            return Directions(
                objective,
                count,
                lambda k, piece: plain(k, piece).mul_(scales[group_of[piece.name]]),
                lambda k, piece: plain(k, piece).div_(scales[group_of[piece.name]]),
            )
        if key != self.key:
            return Directions(objective, count, plain)
        kept, expected = self.kept.tolist(), extreme_of_squares(self.candidates, self.use)

        def chosen(k: int, piece: Piece) -> Tensor:
            if k:  # one direction is chosen; further ones are plain
                return plain(k, piece)
            group = group_of[piece.name]
            return self._confined(objective, key, group)(kept[group], piece)

        def dual(k: int, piece: Piece) -> Tensor:
            return chosen(k, piece) if k else chosen(k, piece).div_(expected)

        return Directions(objective, count, chosen, dual)

    def state_dict(self) -> dict[str, Tensor]:
        if self.scales is None or self.kept is None:
            return {}
        return {"scales": self.scales, "kept": self.kept}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        if state:
            self.scales, self.kept = state["scales"], state["kept"]
