"""Models of transformers' architectures, tiny and with random weights."""

import torch
import transformers


def tiny_of(architecture: str, width: int = 32, heads: int = 4, **settings):
    """Two layers with grouped heads; a head that has a bias gets one that matters."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 40,
        "hidden_size": width,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": 2,
        "head_dim": width // heads,
        "query_pre_attn_scalar": width // heads,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 1,
        "initializer_range": 0.3,
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{architecture}Config")(**sizes | settings)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).eval()
    if model.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    return model
