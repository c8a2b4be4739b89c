"""Two-item Plackett-Luce against TRL's DPOTrainer on the same batch."""

import pytest
import torch
from datasets import Dataset
from helpers import llama
from trainers.tiny import word_tokenizer

from softrl.objectives.listwise import plackett_luce

pytestmark = pytest.mark.slow  # imports trl

BETA = 0.3


def log_probs(model, ids, attention, completion):
    """Sums over completions, by the model's own forward."""
    logits = model(input_ids=ids, attention_mask=attention).logits[:, :-1]
    taken = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (taken * completion[:, 1:]).sum(-1)


def test_two_items_give_trls_loss_and_gradient(tmp_path):
    from trl import DPOConfig, DPOTrainer

    pairs = Dataset.from_list(
        [
            {"prompt": "w4 w5 ", "chosen": "w6 w7 w8", "rejected": "w9"},
            {"prompt": "w3 ", "chosen": "w5", "rejected": "w6 w6 w10"},
            {"prompt": "w8 w9 w10 ", "chosen": "w3 w4", "rejected": "w4 w3"},
        ]
    )
    reference = llama()
    policy = llama()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    args = DPOConfig(
        str(tmp_path), beta=BETA, per_device_train_batch_size=3, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False,
    )  # fmt: skip
    trainer = DPOTrainer(policy, reference, args=args, train_dataset=pairs, processing_class=word_tokenizer())
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    ids, attention, completion = (batch[name] for name in ("input_ids", "attention_mask", "completion_mask"))
    assert len(ids) == 6  # chosen ones, then rejected ones

    scores = BETA * (log_probs(policy, ids, attention, completion)
                     - log_probs(reference, ids, attention, completion).detach())  # fmt: skip
    ours = plackett_luce(torch.stack(scores.chunk(2), 1), torch.tensor([[1, 2]]).expand(3, -1)).mean()
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert abs(theirs.item() - 0.693) > 0.01
    weights = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    for one, other in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(theirs, weights), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
