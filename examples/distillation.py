"""Distil a model into its own first two thirds: forward KL from hidden states. In minutes on two CPU cores.

python examples/distillation.py
"""

import copy

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from safe_kernels import linear_distillation_loss
from safe_train.models.pretrained import smollm2_folder

PROMPTS, TOKENS, BATCH = ("The weather today", "My favourite book", "In the city", "Every morning"), 32, 8


def main(folder=None, steps: int = 30) -> list[float]:
    folder = folder or smollm2_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False)
    student = copy.deepcopy(teacher)
    kept = len(student.base_model.layers) * 2 // 3
    student.base_model.layers = student.base_model.layers[:kept].requires_grad_(True)
    student.base_model.config.num_hidden_layers = kept
    head = teacher.get_output_embeddings().weight
    optimizer = torch.optim.AdamW(student.base_model.layers.parameters(), lr=2e-4)
    losses = []
    for step in range(steps):
        prompt = tokenizer(PROMPTS[step % len(PROMPTS)], return_tensors="pt").input_ids.expand(BATCH, -1)
        ids = teacher.generate(prompt, do_sample=True, top_k=0, max_new_tokens=TOKENS, pad_token_id=0)
        with torch.no_grad():
            teacher_hidden = teacher.base_model(ids).last_hidden_state
        hidden = student.base_model(ids, use_cache=False).last_hidden_state
        loss = linear_distillation_loss(hidden, head, teacher_hidden, head, divergence="forward_kl").loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        print(f"step {step + 1}: KL(teacher || student) {losses[-1]:.3f} nats a token")
    return losses


if __name__ == "__main__":
    main()
