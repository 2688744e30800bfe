"""TRL's GRPO with its loss part on safe_kernels, and the exact KL: two lines more. In minutes on two CPU cores.

python examples/trl_grpo.py
"""

from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from safe_kernels.integrations import trl as trl_patch
from safe_train.models.pretrained import smollm2_folder


def exclamations(completions: list[str], **columns) -> list[float]:
    return [float(text.count("!")) for text in completions]


def main(folder=None, output_dir: str = "runs/trl-grpo", steps: int = 4) -> list[dict]:
    patch = trl_patch.apply(kl="exact")
    print("replaced:", *patch.replaced, sep="\n  ")
    args = GRPOConfig(
        output_dir=output_dir,
        max_steps=steps,
        per_device_train_batch_size=8,
        num_generations=8,
        max_completion_length=16,
        beta=0.05,
        use_cpu=True,
        bf16=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
    )
    prompts = Dataset.from_list([{"prompt": "What a day"}, {"prompt": "The concert was"}])
    trainer = GRPOTrainer(str(folder or smollm2_folder()), exclamations, args, train_dataset=prompts)
    trainer.train()
    trl_patch.revert()
    return trainer.state.log_history


if __name__ == "__main__":
    main()
