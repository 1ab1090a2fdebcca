"""Hugging Face's Trainer: a tiny language model, made of a configuration, which it takes to be on gloo."""

import os
import sys

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from tests.ecosystem.replicas import check, digest


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sentences of numbers, each one more than the last."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        words = (torch.arange(12) + index) % 32
        return {"input_ids": words, "labels": words}


config = GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
arguments = TrainingArguments(
    output_dir=sys.argv[1],
    use_cpu=True,
    ddp_backend="gloo",
    per_device_train_batch_size=4,
    num_train_epochs=1,
    learning_rate=0.01,
    logging_steps=4,
    save_steps=8,
    eval_strategy="epoch",
    report_to=[],
    disable_tqdm=True,
)
torch.manual_seed(int(os.environ["RANK"]))  # so that it is DDP that makes them alike
model = GPT2LMHeadModel(config)
before = digest(model)
trainer = Trainer(model=model, args=arguments, train_dataset=Counting(), eval_dataset=Counting())
trainer.train()
assert trainer.evaluate()["eval_loss"] < 3.4, "it has learned nothing: that is the loss of a guess"
check(model, before)
