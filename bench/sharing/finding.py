"""What a scenario found: measured rows, and claims with the bound each has to keep.

Knows no scenario. A claim is met or missed by the number it carries, never by hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

Row = Mapping[str, float | int | str]


@dataclass(frozen=True, slots=True)
class Claim:
    """`measured` must be at most, at least or equal to `bound`."""

    says: str
    measured: float
    relation: str  # "<=", ">=", "<", ">" or "="
    bound: float

    @property
    def met(self) -> bool:
        """Whether the measured number keeps the bound."""
        return {
            "<=": self.measured <= self.bound,
            ">=": self.measured >= self.bound,
            "<": self.measured < self.bound,
            ">": self.measured > self.bound,
            "=": self.measured == self.bound,
        }[self.relation]


@dataclass(frozen=True, slots=True)
class Finding:
    """One scenario's result: `setting` says what was run, `rows` what was seen, all rows with the same columns."""

    scenario: str
    setting: str
    rows: tuple[Row, ...]
    claims: tuple[Claim, ...]

    @property
    def met(self) -> bool:
        """Whether every claim is."""
        return all(claim.met for claim in self.claims)

    def document(self) -> dict[str, Any]:
        """As one JSON object."""
        claims = [asdict(claim) | {"met": claim.met} for claim in self.claims]
        return {"scenario": self.scenario, "setting": self.setting, "rows": list(self.rows), "claims": claims}


def share(part: float, whole: float) -> float:
    """`part` of `whole` in percent, to a hundredth."""
    return round(100.0 * part / whole, 2) if whole else 0.0
