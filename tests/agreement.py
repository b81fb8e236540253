"""When two greedy answers agree, although 16 bits round differently.

Two runs of one model differ in rounding: another batch, another rank count, another kernel. A near
tie may then fall the other way, after which two greedy streams differ for good. So streams must
agree up to the first near tie: a step whose two best tokens lie within ``tie`` of each other.
"""

from __future__ import annotations

import torch

TIE = 0.15  # nats; bf16 activations move a log-probability of the bundled model by less than half
TOLERANCE = 0.1  # nats, of the log-probability of a chosen token


@torch.inference_mode()
def assert_agrees_with_model(
    answer: dict, prompt: list[int], model: torch.nn.Module, tolerance: float = TOLERANCE,
    tie: float = TIE,
) -> None:  # fmt: skip
    """One answer of an engine against a transformers model, as a rule the float32 twin."""
    ids = torch.tensor([prompt + answer["tokens"]])
    logprobs = torch.log_softmax(model(ids).logits[0].float(), -1)[len(prompt) - 1 : -1]
    steps = zip(logprobs, answer["tokens"], answer["logprobs"], strict=True)
    for agreed, (step, token, found) in enumerate(steps):
        best = float(step.max())
        if token != int(step.argmax()):
            lost = best - float(step[token])
            assert lost < tie, f"{agreed} tokens agree, then {token} is {lost:.3f} nats worse"
            return
        assert abs(float(step[token]) - found) < tolerance


def assert_answers_agree(
    found: list[dict], reference: list[dict], tolerance: float = TOLERANCE, tie: float = TIE
) -> dict[str, float]:
    """Answers of two engines to the same prompts.

    Returns:
        How close they are: tokens compared and their count, largest difference of a
        log-probability, and answers that left the reference at a near tie.
    """
    assert len(found) == len(reference)
    closeness = {"tokens": 0, "agreed": 0, "largest_difference": 0.0, "near_ties": 0}
    for answer, expected in zip(found, reference, strict=True):
        assert len(answer["tokens"]) == len(expected["tokens"])
        closeness["tokens"] += len(expected["tokens"])
        for step, (token, wanted) in enumerate(
            zip(answer["tokens"], expected["tokens"], strict=True)
        ):
            if token != wanted:
                gap = expected["gaps"][step]
                assert gap < tie, f"{step} tokens agree, then {token} in place of {wanted}, where "\
                    f"the reference's two best are {gap:.3f} nats apart"  # fmt: skip
                closeness["near_ties"] += 1
                break
            difference = abs(answer["logprobs"][step] - expected["logprobs"][step])
            assert difference < tolerance, f"token {step}: {difference:.3f} nats apart"
            closeness["largest_difference"] = max(closeness["largest_difference"], difference)
            closeness["agreed"] += 1
    return closeness
