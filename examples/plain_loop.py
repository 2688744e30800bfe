"""REINFORCE with an exact KL in a plain PyTorch loop: no trainer, and no logits tensor. On two CPU cores, in minutes.

python examples/plain_loop.py
"""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_kernels import linear_token_stats
from safe_train.models.pretrained import smollm2_folder

PROMPT, COMPLETIONS, TOKENS, BETA = "The weather today", 16, 12, 0.05


def reward(texts: list[str]) -> torch.Tensor:
    return torch.tensor([float(text.count(" the ")) for text in texts])


def main(folder=None, steps: int = 8) -> list[float]:
    folder = folder or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    reference = copy.deepcopy(model.base_model)
    head = model.get_output_embeddings().weight  # tied to the embeddings here, and frozen with them
    head.requires_grad_(False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-5)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids.expand(COMPLETIONS, -1)
    means = []
    for step in range(steps):
        ids = model.generate(
            prompt, do_sample=True, top_k=0, min_new_tokens=TOKENS, max_new_tokens=TOKENS, pad_token_id=0
        )
        rewards = reward(tokenizer.batch_decode(ids[:, prompt.shape[1] :]))
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        hidden = model.base_model(ids).last_hidden_state[:, prompt.shape[1] - 1 : -1]
        with torch.no_grad():
            ref_hidden = reference(ids).last_hidden_state[:, prompt.shape[1] - 1 : -1]
        stats = linear_token_stats(hidden, head, ids[:, prompt.shape[1] :], ref_hidden=ref_hidden)
        loss = (BETA * stats.kl - advantages[:, None] * stats.logprob).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        means.append(rewards.mean().item())
        print(f"step {step + 1}: reward {means[-1]:.2f}, KL {stats.kl.mean().item():.4f} nats a token")
    return means


if __name__ == "__main__":
    main()
