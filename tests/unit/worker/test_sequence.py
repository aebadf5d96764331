"""A sequence by itself: what it counts, when it ends, what it says once."""

from __future__ import annotations

from array import array
from typing import Any

import pytest

from kvstore.scope import Region, ScopeRoot
from worker.batch import SamplingParams
from worker.sequence import AdmissionFacts, Finish, Sequence, SequenceRequest


def make(
    prompt: list[int], *, extra: list[int] | None = None, priority: int = 0, arrival: int = 0, **sampling: Any
) -> Sequence:
    request = SequenceRequest(
        sequence_id=7,
        token_ids=array("I", prompt + (extra or [])),
        num_prompt_tokens=len(prompt),
        regions=(Region(ScopeRoot(bytes(16)), None),),
        sampling=SamplingParams(**({"max_tokens": 3} | sampling)),
        priority=priority,
    )
    return Sequence(request, arrival=arrival, now=1.0)


def test_it_ends_by_length() -> None:
    sequence = make([1, 2])
    outputs = [sequence.append(token) for token in (5, 6, 7)]
    assert [output.first_index for output in outputs] == [0, 1, 2]
    assert [output.finish for output in outputs] == [None, None, Finish.LENGTH]
    assert sequence.token_ids.tolist() == [1, 2, 5, 6, 7]


def test_a_stop_token_is_said_and_named() -> None:
    output = make([1, 2], stop_token_ids=(9, 8)).append(8)
    assert (output.token_ids, output.finish, output.stop_token_id) == ((8,), Finish.STOP, 8)


def test_a_stop_token_at_the_last_place_is_a_stop() -> None:
    assert make([1], max_tokens=1, stop_token_ids=(8,)).append(8).finish is Finish.STOP


def test_a_continuation_counts_from_the_prompt() -> None:
    sequence = make([1, 2], extra=[5, 6], min_tokens=3, stop_token_ids=(9,))
    assert sequence.num_generated_tokens == 2
    assert sequence.banned_token_ids == (9,)
    output = sequence.append(7)
    assert (output.first_index, output.finish) == (2, Finish.LENGTH)
    assert sequence.banned_token_ids == ()


def test_admission_is_said_once() -> None:
    sequence = make([1, 2])
    sequence.admission = AdmissionFacts(1, 0, 0.5)
    assert [sequence.append(token).admission for token in (5, 6)] == [AdmissionFacts(1, 0, 0.5), None]


def test_the_request_is_not_changed_by_the_sequence() -> None:
    sequence = make([1, 2])
    sequence.append(5)
    assert sequence.request.token_ids.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("first", "then"),
    [({"priority": 1, "arrival": 5}, {"priority": 0, "arrival": 1}), ({"arrival": 1}, {"arrival": 2})],
)
def test_order_is_by_priority_then_arrival(first: dict[str, int], then: dict[str, int]) -> None:
    assert make([1], **first).order < make([1], **then).order


def test_an_end_without_a_token_keeps_the_index() -> None:
    sequence = make([1, 2], extra=[5])
    output = sequence.end(Finish.CANCELLED)
    assert (output.first_index, output.token_ids, output.finish) == (1, (), Finish.CANCELLED)
