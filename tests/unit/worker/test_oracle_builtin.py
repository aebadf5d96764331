"""The built-in model against transformers: stored in bfloat16, with a configuration of the older spelling."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM

from pando.model_folder import resolve_model
from tests.oracle import oracle_logits
from tests.runner_driver import Driver, load, random_tokens


def test_greedy_tokens_and_logits_of_a_long_prompt() -> None:
    runner = load("pando-tiny", device_blocks=200)
    model = AutoModelForCausalLM.from_pretrained(resolve_model("pando-tiny"), dtype=torch.float32).eval()
    prompt = random_tokens(700, seed=1, vocab_size=runner.spec.vocab_size)
    driver = Driver(runner)
    sequence = driver.start(prompt)
    generated = driver.generate([sequence], 64, chunk=512)[0]
    driver.preempt(sequence)
    ours = driver.logits(driver.start(prompt + generated), chunk=300)
    expected = oracle_logits(model, prompt + generated)
    # Each of the two is float32, and within 1e-4 of the logits in float64.
    torch.testing.assert_close(ours, expected, atol=2e-4, rtol=0)
    assert expected[len(prompt) - 1 : -1].argmax(-1).tolist() == generated
    runner.close()
