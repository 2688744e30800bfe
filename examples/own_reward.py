"""Train a small model with a reward of your own: a Python function of the completions. On two CPU cores, in minutes.

python examples/own_reward.py
"""

from safe_train import SafeConfig, SafeTrainer

OPENINGS = (
    "On Monday",
    "In the kitchen",
    "My neighbour",
    "The train",
    "After lunch",
    "The dog",
    "At school",
    "Our garden",
)


def short_words(prompts, completions, **columns):
    """Rewards short words: minus the mean number of letters. One number a completion; None where it cannot judge."""
    return [-sum(map(len, text.split())) / len(text.split()) if text.split() else None for text in completions]


def main(model: str = "smollm2-135m-instruct", output_dir: str = "runs/own-reward", steps: int = 10) -> list[dict]:
    args = SafeConfig(
        algorithm="grpo",
        output_dir=output_dir,
        use_cpu=True,
        total_steps=steps,
        prompts_per_step=4,
        completions_per_prompt=8,
        max_new_tokens=16,
        minibatch_size=16,
        learning_rate=2e-3,
        lora_last_layers=8,
        kl_budget=0.2,
    )
    prompts = [{"prompt": opening} for opening in OPENINGS]
    history = SafeTrainer(model, short_words, args, train_dataset=prompts).train()
    first, last = history[0], history[-1]
    print(f"reward {first['reward']:.2f} -> {last['reward']:.2f}, KL {last['kl']:.3f}: {output_dir}/report.png")
    return history


if __name__ == "__main__":
    main()
