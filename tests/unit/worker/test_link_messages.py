"""What a session has to say, as the router reads it."""

from __future__ import annotations

import pytest

from pando.worker.v1 import worker_pb2 as pb
from worker.link_messages import worker_messages
from worker.sequence import AdmissionFacts, Finish, SequenceOutput
from worker.session import Attempt, News

ENDS = [
    (Finish.STOP, pb.FINISH_STOP),
    (Finish.LENGTH, pb.FINISH_LENGTH),
    (Finish.CANCELLED, pb.FINISH_CANCELLED),
    (Finish.ERROR, pb.FINISH_ERROR),
    (Finish.DEADLINE, pb.FINISH_DEADLINE),
    (Finish.REJECTED, pb.FINISH_REJECTED),
]


def step(outputs: dict[Attempt, SequenceOutput]) -> list[pb.SequenceOutput]:
    (message,) = worker_messages(News(outputs, [], [], None))
    assert message.WhichOneof("message") == "step"
    return list(message.step.sequences)


def test_a_step_says_the_tokens_of_every_sequence_under_the_routers_names() -> None:
    first, second = step({Attempt(7, 2): SequenceOutput(1, 3, (4, 5)), Attempt(8, 1): SequenceOutput(2, 0, (6,))})
    assert first == pb.SequenceOutput(sequence=7, attempt=2, first_index=3, token_ids=[4, 5])
    assert second == pb.SequenceOutput(sequence=8, attempt=1, first_index=0, token_ids=[6])
    assert not first.HasField("admission")


@pytest.mark.parametrize(("finish", "word"), ENDS)
def test_an_end_is_said_with_its_cause(finish: Finish, word: int) -> None:
    (said,) = step({Attempt(7, 2): SequenceOutput(1, 3, (4,), finish, None, 4, "WHY")})
    assert (said.finish, said.stop_token_id, said.reason, list(said.token_ids)) == (word, 4, "WHY", [4])


def test_an_admission_is_said_whole() -> None:
    facts = AdmissionFacts(16, 0, 0.25, cached_cpu_tokens=8)
    (said,) = step({Attempt(7, 2): SequenceOutput(1, 0, (4,), admission=facts)})
    assert (said.admission.cached_device_tokens, said.admission.cached_cpu_tokens, said.admission.queue_ms) == (
        16,
        8,
        250,
    )
