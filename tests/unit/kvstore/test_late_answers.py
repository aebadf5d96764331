"""Answers that come when accounts have changed meanwhile: nothing but the block that they are about is given up."""

from __future__ import annotations

from kvstore.quota import Quota
from tests.unit.kvstore.test_tiers import A, B, Worker, own, text


def test_a_corrupt_copy_of_an_owner_over_its_ceiling_costs_others_nothing() -> None:
    """The ceiling was lowered while the load was under way: the copy is given up as soon as nobody reads it."""
    worker = Worker()
    for burst in range(4):
        worker.use(own(A if not burst else B), text(100 * burst, 6))
    table, attached = worker.attach(own(A), text(0, 2))
    assert attached.load is not None
    worker.copy()
    theirs = worker.tiers.cpu.account(B).charge
    assert theirs > 0
    worker.tiers.cpu.set_quota(A, Quota(ceiling=0))
    for order, _ in worker.answers:
        worker.tiers.promoted(order.id, ok=False)
    table.release()
    worker.tiers.check(deep=True)
    assert (worker.tiers.cpu.account(A).charge, worker.tiers.cpu.account(B).charge) == (0, theirs)
