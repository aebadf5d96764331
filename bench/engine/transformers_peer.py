"""`transformers` as a peer: generate in static batches, and its continuous batching, in a process of its own.

Knows no wire but lines of JSON on its standard streams: a request names what to run, the answer has the figures. There
is no server between, in the peer's favour.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.engine.drive import (
    Figures,
    Sample,
    decode_rate,
    workload_figures,
)
from bench.engine.scenario import DECODE_PROMPT, DECODE_TOKENS, PREFILL_TOKENS, Ask, MultiTenant, make_asks, single_ask


class TransformersPeer:
    """The parent's end. `close` it."""

    def __init__(self, folder: Path, dtype: str, threads: int, log: Path) -> None:
        command = [sys.executable, "-m", "bench.engine.transformers_peer", str(folder), dtype, str(threads)]
        with log.open("wb") as says:
            self._child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=says, text=True
            )

    @property
    def pid(self) -> int:
        """Of the child."""
        return self._child.pid

    async def measure_generate(self, scenario: MultiTenant, number: int, into: Figures) -> None:
        """The workload in static batches, of which none reuses anything, and one request at a time."""
        into |= self._ask({"run": "generate", "scenario": asdict(scenario), "number": number})
        into |= self._ask({"run": "single", "number": number})

    async def measure_continuous(self, scenario: MultiTenant, number: int, into: Figures) -> None:
        """The workload in continuous batches, which reuse what they can."""
        into |= self._ask({"run": "continuous", "scenario": asdict(scenario), "number": number})

    def close(self) -> None:
        """End the child."""
        self._child.terminate()
        self._child.wait(20)
        for stream in (self._child.stdin, self._child.stdout):
            if stream is not None:
                stream.close()

    def _ask(self, what: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None and self._child.stdout is not None
        self._child.stdin.write(json.dumps(what) + "\n")
        self._child.stdin.flush()
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("transformers ended without an answer")
        found: dict[str, Any] = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"transformers: {found['error']}")
        return found


class _Model:
    """The child's end."""

    def __init__(self, folder: str, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._torch = torch
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
        self._model.train(False)
        self._vocab = int(self._model.config.vocab_size)

    def answer(self, what: dict[str, Any]) -> dict[str, Any]:
        if what["run"] == "single":
            return self._single(what["number"])
        scenario = MultiTenant(**what["scenario"])
        asks = make_asks(scenario, self._vocab, what["number"])
        reuse = what["run"] == "continuous"
        samples = self._continuous(asks, scenario) if reuse else self._batches(asks, scenario)
        return workload_figures(samples, reuse=reuse)

    def _batches(self, asks: Sequence[Ask], scenario: MultiTenant) -> list[Sample]:
        size = scenario.concurrency
        return [one for first in range(0, len(asks), size) for one in self._generate(asks[first : first + size])]

    def _generate(self, asks: Sequence[Ask]) -> list[Sample]:
        """One batch of prompts of one length."""
        from transformers import StoppingCriteriaList

        times: list[float] = []

        def stamp(ids: Any, scores: Any, **_: Any) -> Any:
            times.append(time.perf_counter())
            return self._torch.zeros(ids.shape[0], dtype=self._torch.bool)

        began = time.perf_counter()
        ids = self._torch.tensor([ask.token_ids for ask in asks])
        count = asks[0].output_tokens
        with self._torch.inference_mode():
            out = self._model.generate(
                ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                stopping_criteria=StoppingCriteriaList([stamp]),
            )
        assert out.shape[1] == ids.shape[1] + count
        return [Sample(began, times[0], time.perf_counter(), count) for _ in asks]

    def _continuous(self, asks: Sequence[Ask], scenario: MultiTenant) -> list[Sample]:
        from transformers import ContinuousBatchingConfig, GenerationConfig

        count = scenario.output_tokens
        generation: Any = GenerationConfig(max_new_tokens=count, eos_token_id=-1, do_sample=False)  # type: ignore[no-untyped-call]
        # Room for the whole workload as far as it is open at once.
        pages = -(-(scenario.prompt_tokens + count) // 256) * scenario.concurrency
        config = ContinuousBatchingConfig(
            num_blocks=2 * pages, max_batch_tokens=512, max_requests_per_batch=scenario.concurrency
        )
        began = time.perf_counter()
        outputs = self._model.generate_batch(
            [list(ask.token_ids) for ask in asks],
            generation_config=generation,
            continuous_batching_config=config,
            record_timestamps=True,
            warmup=False,
        )
        assert len(outputs) == len(asks) and all(len(out.generated_tokens) == count for out in outputs.values())
        # All are handed over at once: a request counts from when it was begun, as with a client that keeps C open.
        samples = []
        for out in outputs.values():
            stamps = out.timestamps or []
            samples.append(Sample(max(began, out.lifespan[0]), stamps[0], stamps[-1], count))
        return samples

    def _single(self, number: int) -> dict[str, Any]:
        [decode] = self._generate([single_ask("decode", DECODE_PROMPT, DECODE_TOKENS, self._vocab, number)])
        [prefill] = self._generate([single_ask("prefill", PREFILL_TOKENS, 1, self._vocab, number)])
        return {"decode_tokens_per_s": decode_rate(decode), "prefill_tokens_per_s": PREFILL_TOKENS / prefill.ttft_s}


def main() -> int:
    """Answer until the input ends."""
    folder, dtype, threads = sys.argv[1:]
    model = _Model(folder, dtype, int(threads))
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    for line in sys.stdin:
        try:
            found = model.answer(json.loads(line))
        except Exception as error:  # noqa: BLE001 - the parent says what failed
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        print(json.dumps(found), file=out, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
