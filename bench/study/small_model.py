"""A model of a million parameters that speaks a little like SmolLM2: small enough for runs of 1,500 steps on a CPU.

Its vocabulary is small as well: with SmolLM2's 49,152 ids nearly all of a step's time goes into them.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bench.study.arms import BASE, FRESH
from safe_train.config import SafeConfig
from safe_train.data.prompts import load_prompts
from safe_train.models.pretrained import load_model, load_tokenizer

COMPLETIONS, EPOCHS, BATCH, RATE = 16, 30, 32, 3e-3  # completions of each of the demo's 32 openings
VOCABULARY, END = 2048, "<|end|>"
SHAPE = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}


def make_small_model(folder: Path) -> None:
    """Trained by plain cross-entropy on completions that SmolLM2 samples; made once."""
    if folder.is_dir():
        return
    torch.manual_seed(0)
    texts = sampled(SafeConfig.from_dict(BASE | FRESH | {"use_cpu": True}))
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([a + b for a, b in texts], VOCABULARY, min_frequency=1, special_tokens=[END])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, pad_token=END)
    ids = [(tokenizer(a)["input_ids"], [*tokenizer(b)["input_ids"], tokenizer.eos_token_id]) for a, b in texts]
    config = LlamaConfig(
        vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, max_position_embeddings=1024, **SHAPE,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    fit(model, [(torch.tensor([*a, *b]), len(a)) for a, b in ids])
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.rename(folder)


@torch.no_grad()
def sampled(args: SafeConfig) -> list[tuple[str, str]]:
    """Openings and their completions."""
    tokenizer = load_tokenizer(args)
    teacher, texts = load_model(args, torch.device("cpu")), []
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": args.max_new_tokens, "num_return_sequences": COMPLETIONS}
    for prompt in load_prompts(None, "dataset", tokenizer, args).at(0, 32):
        ids_1L = torch.tensor([prompt.ids])
        ids_BL = teacher.generate(ids_1L, attention_mask=torch.ones_like(ids_1L), **how)[:, len(prompt.ids) :]
        texts += [(str(prompt.text), text) for text in tokenizer.batch_decode(ids_BL, skip_special_tokens=True)]
    return texts


def fit(model: LlamaForCausalLM, pairs: list[tuple[Tensor, int]]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    updates = EPOCHS * -(-len(pairs) // BATCH)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, updates)
    for epoch in range(EPOCHS):
        for chosen in torch.randperm(len(pairs)).split(BATCH):
            rows = [pairs[i] for i in chosen.tolist()]
            ids_BL = pad_sequence([ids for ids, _ in rows], batch_first=True)
            hidden_BLH = model.model(ids_BL).last_hidden_state
            hidden_NH = torch.cat([hidden_BLH[i, start - 1 : len(ids) - 1] for i, (ids, start) in enumerate(rows)])
            loss = cross_entropy(model.lm_head(hidden_NH), torch.cat([ids[start:] for ids, start in rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"small model, epoch {epoch + 1}: loss {loss.item():.3f}", flush=True)
