"""What is gathered of a linear's inputs while calibration data flows: add and merge.

Legend: T tokens, I input columns.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar, Self

import torch
from torch import Tensor

from pocketlm.core.linalg import InverseFactor, inverse_factor

PANEL = 192  # columns of a panel of the Gram matrix; those above the diagonal are not computed
CUDA_PANEL = 10 * PANEL  # a GPU wants larger products


class Stat(ABC):
    """A running statistic over the inputs of a group of linears.

    Args:
        columns: I, the width of the inputs.
        device: Where it is gathered.
    """

    paired: ClassVar[bool] = False  # `add` also takes the original model's inputs of those tokens
    gathered: ClassVar[bool] = True  # from inputs; else the engine has it from a pass before

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        self.columns, self.device, self.tokens = columns, torch.device(device), 0

    @abstractmethod
    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""

    @abstractmethod
    def merge(self, other: Self) -> None:
        """Takes over what another rank or pass has gathered."""


class Hessian(Stat):
    """H = (2 / T) XᵀX, Hessian of the squared output error (GPTQ, arXiv:2210.17323, eq. 3).

    Summed in float32, on a GPU from 16-bit inputs as they are; the sum is kept unscaled, lower
    panels only, until `matrix_II`.
    """

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._sum_II = torch.zeros(columns, columns, device=self.device)
        self._factors: dict[tuple[float, float, bool], InverseFactor] = {}

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        self._factors.clear()
        x_TI = x_TI.detach().reshape(-1, self.columns)
        self.tokens += x_TI.shape[0]
        if x_TI.is_cuda and x_TI.dtype != torch.float32:
            # 16-bit products are exact in float32, in which tensor cores sum them.
            for start in range(0, self.columns, CUDA_PANEL):
                stop = min(start + CUDA_PANEL, self.columns)
                panel, part_TC = self._sum_II[start:stop, :stop], x_TI[:, start:stop]
                torch.addmm(panel, part_TC.T, x_TI[:, :stop], out_dtype=torch.float32, out=panel)
            return
        x_TI = x_TI.float()
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            panel = self._sum_II[start:stop, :stop]
            panel.addmm_(x_TI[:, start:stop].T, x_TI[:, :stop])

    def merge(self, other: Self) -> None:
        """Adds what another pass has gathered."""
        self._factors.clear()
        self._sum_II += other._sum_II
        self.tokens += other.tokens

    def matrix_II(self) -> Tensor:
        """The Hessian, symmetric float32 [I, I]; zeros where no token was seen."""
        full_II = self._sum_II * (2.0 / max(self.tokens, 1))
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            full_II[:start, start:stop] = full_II[start:stop, :start].T
        return full_II

    @property
    def reached(self) -> bool:
        """Whether any input was other than zero: without one the Hessian says nothing."""
        return bool((self._sum_II.diagonal() > 0).any())

    def diagonal_I(self) -> Tensor:
        """The Hessian's diagonal [I]: how much each input weighs."""
        return self._sum_II.diagonal() * (2.0 / max(self.tokens, 1))

    def shrunk_II(self, shrinkage: float = 0.0) -> Tensor:
        """The Hessian with its diagonal raised in proportion: H + (a + I / T) diag(H), [I, I].

        The share I / T makes up for few tokens. It is, up to a factor, the posterior mean of the
        inputs' second moments after T tokens if I others had been seen before, of the same energies
        and uncorrelated (shrinkage towards the diagonal: Ledoit and Wolf 2004; Schäfer and Strimmer
        2005, target D). With T of about I the sample alone is worse than no sample at all.

        Args:
            shrinkage: a.
        """
        shrunk_II = self.matrix_II()
        shrunk_II.diagonal().mul_(1 + shrinkage + self.columns / max(self.tokens, 1))
        return shrunk_II

    def through(self, weight_RI: Tensor) -> Hessian:
        """The Hessian of what a linear [R, I] gives for these inputs: M H Mᵀ, [R, R]."""
        carried = Hessian(weight_RI.shape[0], self.device)
        carried.tokens = self.tokens
        weight_RI = weight_RI.to(self._sum_II)
        carried._sum_II = weight_RI @ (self.matrix_II() * (max(self.tokens, 1) / 2)) @ weight_RI.T
        return carried

    def effective_rank(self) -> float:
        """In how many directions the inputs vary: I² / Σ_ij c_ij², c the inputs' correlations.

        The participation ratio tr(C)² / tr(C²) of C = H scaled to a diagonal of ones: unscaled, a
        few massive inputs hide all others. I for uncorrelated inputs, 1 where all go together;
        columns without input do not count.
        """
        size_I = self._sum_II.diagonal().sqrt()
        inverse_I = torch.where(size_I > 0, 1 / size_I, 0.0)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for start in range(0, self.columns, PANEL):
            stop = min(start + PANEL, self.columns)
            panel = self._sum_II[start:stop, :stop] * inverse_I[start:stop, None] * inverse_I[:stop]
            total += 2 * panel[:, :start].square().sum() + panel[:, start:].square().sum()
        return int((size_I > 0).sum()) ** 2 / max(float(total), 1.0)

    def inverse_factor(
        self, damping: float, order_I: Tensor | None, shrinkage: float = 0.0
    ) -> InverseFactor:
        """U with (H + damping)⁻¹ = UᵀU, factorised once for all linears that share this input.

        Args:
            damping: Share of the mean diagonal to add.
            order_I: The order of the columns by falling diagonal, or None as stored.
            shrinkage: Share of each column's own diagonal to add beside that for few tokens.

        Returns:
            The factor of the reordered, shrunk Hessian.
        """
        key = (damping, shrinkage, order_I is not None)
        if key not in self._factors:
            hessian_II = self.shrunk_II(shrinkage)
            if order_I is not None:
                # One axis after the other: both at once makes two matrices of indices on a GPU.
                hessian_II = hessian_II.index_select(0, order_I)
                hessian_II = hessian_II.index_select(1, order_I)
            self._factors[key] = inverse_factor(hessian_II, damping)
        return self._factors[key]


class AbsMax(Stat):
    """The largest magnitude of each input [I]."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._max_I = torch.zeros(columns, device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, self.columns)
        if x_TI.shape[0]:
            self._max_I = torch.maximum(self._max_I, x_TI.abs().amax(0).float())
        self.tokens += x_TI.shape[0]

    def merge(self, other: Self) -> None:
        """Takes the larger of each."""
        self._max_I = torch.maximum(self._max_I, other._max_I)
        self.tokens += other.tokens

    def value_I(self) -> Tensor:
        """The largest |x|; zeros where no token was seen."""
        return self._max_I


class AbsMean(Stat):
    """The mean magnitude of each input [I]."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._sum_I = torch.zeros(columns, dtype=torch.float64, device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, self.columns)
        self._sum_I += x_TI.abs().sum(0, dtype=torch.float32)
        self.tokens += x_TI.shape[0]

    def merge(self, other: Self) -> None:
        """Adds what another pass has gathered."""
        self._sum_I += other._sum_I
        self.tokens += other.tokens

    def value_I(self) -> Tensor:
        """The mean |x|, float32; zeros where no token was seen."""
        return (self._sum_I / max(self.tokens, 1)).float()


class Range(Stat):
    """The least and the largest of all inputs, float32 scalars; both 0 where no token was seen."""

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self.low = self.high = torch.zeros((), device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, self.columns)
        if x_TI.shape[0]:
            low, high = torch.aminmax(x_TI)
            self.low = torch.minimum(self.low, low.float())
            self.high = torch.maximum(self.high, high.float())
        self.tokens += x_TI.shape[0]

    def merge(self, other: Self) -> None:
        """Takes the wider of both."""
        self.low, self.high = (
            torch.minimum(self.low, other.low),
            torch.maximum(self.high, other.high),
        )
        self.tokens += other.tokens


class Sample(Stat):
    """The inputs of some tokens themselves, spread evenly over all: at most `ROWS`, float32.

    Token n is kept where the fraction of n · golden ratio is below a share that is halved whenever
    too many are held: neither the order of batches nor their number decides beforehand, and the
    first tokens of windows, whose inputs are often unlike all others, get no more than their due.
    """

    ROWS: ClassVar[int] = 1024
    GOLDEN: ClassVar[float] = 0.6180339887498949

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._rows: list[Tensor] = []
        self._places: list[Tensor] = []
        self._share = 1.0

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I]."""
        x_TI = x_TI.detach().reshape(-1, self.columns)
        places_T = torch.arange(self.tokens, self.tokens + x_TI.shape[0], dtype=torch.float64)
        places_T = (places_T * self.GOLDEN).frac()
        self.tokens += x_TI.shape[0]
        self._keep(x_TI, places_T)

    def _keep(self, x_TI: Tensor, places_T: Tensor) -> None:
        chosen_T = places_T < self._share
        self._rows.append(x_TI[chosen_T.to(x_TI.device)].float().to(self.device))
        self._places.append(places_T[chosen_T])
        while sum(len(places) for places in self._places) > self.ROWS:
            self._share /= 2
            keeps = [places < self._share for places in self._places]
            self._rows = [r[k.to(r.device)] for r, k in zip(self._rows, keeps, strict=True)]
            self._places = [p[k] for p, k in zip(self._places, keeps, strict=True)]

    def merge(self, other: Self) -> None:
        """Takes over another's rows, thinned to the smaller share of both."""
        self._share = min(self._share, other._share)
        rows, places = [*self._rows, *other._rows], [*self._places, *other._places]
        self._rows, self._places = [], []
        for row_TI, place_T in zip(rows, places, strict=True):
            self._keep(row_TI, place_T)
        self.tokens += other.tokens

    def rows_TI(self) -> Tensor:
        """The kept inputs; none where no token was seen."""
        if not self._rows:
            return torch.empty(0, self.columns, device=self.device)
        return torch.cat(self._rows)


class Drift(Stat):
    """D = (2 / T) (X₀ - X)ᵀX: how the original model's inputs X₀ differ from X, seen through X."""

    paired: ClassVar[bool] = True

    def __init__(self, columns: int, device: torch.device | str = "cpu") -> None:
        super().__init__(columns, device)
        self._sum_II = torch.zeros(columns, columns, device=self.device)

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Takes the inputs of some tokens, [..., I], and the original model's of the same."""
        assert original_TI is not None
        x_TI = x_TI.detach().reshape(-1, self.columns).float()
        self.tokens += x_TI.shape[0]
        difference_TI = original_TI.detach().reshape(-1, self.columns).float() - x_TI
        self._sum_II.addmm_(difference_TI.T, x_TI)

    def merge(self, other: Self) -> None:
        """Adds what another pass has gathered."""
        self._sum_II += other._sum_II
        self.tokens += other.tokens

    def matrix_II(self) -> Tensor:
        """D, float32 [I, I]."""
        return self._sum_II * (2.0 / max(self.tokens, 1))


class GradientSize(Stat):
    """How large the loss's gradient is in each weight: √ E g² over sequences [O, I].

    g is the gradient of the mean loss of one sequence, in the original model.

    Args:
        size_OI: Not negative.
    """

    gathered: ClassVar[bool] = False

    def __init__(self, size_OI: Tensor) -> None:
        super().__init__(size_OI.shape[1], size_OI.device)
        self.size_OI = size_OI

    def add(self, x_TI: Tensor, original_TI: Tensor | None = None) -> None:
        """Nothing: inputs do not tell."""

    def merge(self, other: Self) -> None:
        """Nothing: it is whole."""
