"""A language model, a tokenizer and prompts small enough that a whole training run takes a second."""

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from safe_train.config import SafeConfig

# Of log-probs by two forwards of one float32 model, which sum in another order. A model has no plain twin whose error
# the rule of cases.py could take.
FORWARDS = {"atol": 2e-5, "rtol": 0}
WORDS = ["<pad>", "<eos>", *"the a cat dog sat ran on under mat tree good bad happy sad very not and or is was".split()]
PROMPTS = [{"prompt": text} for text in ("the cat", "a dog sat on", "the", "the happy dog ran under a", "a tree is")]


def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")


def model(seed: int = 0, **changes) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    settings = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def trained_adapter(base=None, name: str = "default", **settings):
    """A `PeftModel` as supervised fine-tuning leaves it: what is trained has an effect already."""
    import peft

    values = {"r": 4, "target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"} | settings
    adapted = peft.get_peft_model(model() if base is None else base, peft.LoraConfig(**values), adapter_name=name)
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=draw))
    return adapted


def good_words(prompts, completions, **columns) -> list[float]:
    """The share of pleasant words: a reward that a tiny model can learn in a few steps."""
    return [sum(word in ("good", "happy") for word in text.split()) / 4 for text in completions]


def settings(output_dir, **changes) -> SafeConfig:
    values = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "total_steps": 3,
        "prompts_per_step": 4,
        "completions_per_prompt": 2,
        "max_new_tokens": 6,
        "max_tokens_per_microbatch": 24,
        "minibatch_size": 4,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "eval_completions": 4,
        "samples_every": 1,
        "save_every": 2,
    }
    return SafeConfig(**values | changes)


def trainer(output_dir, reward=good_words, policy=None, prompts=PROMPTS, **changes):
    from safe_train.paper import make_trainer

    args = settings(output_dir, **changes)
    return make_trainer(
        args,
        model=model() if policy is None else policy,
        reward_funcs=reward,
        train_dataset=prompts,
        eval_dataset=prompts,
        processing_class=tokenizer(),
    )


def experience_of(trainer):
    """What a first step collects, ready for its update, and the controller's decision."""
    from safe_train.algorithms.advantages import credit
    from safe_train.sampling.experience import Experience

    rollout = trainer.sample(0)
    rewards = trainer.rewards(*rollout.for_rewards())["reward"]
    experience = Experience(trainer.policy, trainer.critic, rollout, trainer.args, trainer.device)
    control = trainer.update_controller(experience, rewards)
    credit(experience, trainer.training_rewards(rewards, rollout), control, trainer.args)
    return experience, control
