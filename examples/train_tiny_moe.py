"""Train the three small MoEs that ship with moeprune, on text and code that come with Python and on generated drills.

    python examples/train_tiny_moe.py --data src/moeprune/data             # text files and tasks
    python examples/train_tiny_moe.py --family qwen3_moe -o OUT --steps N  # one model

The models are small enough for a laptop and real enough for pruning to hurt: their experts specialise, because routing
is hardly balanced, and little else than the routed experts can hold what they learn.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from tiny_moe.data import train_tokenizer, training_stream, write_data
from tiny_moe.text import load_corpus
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

LENGTH, BATCH = 128, 32
TASKS = ["prose", "code", "sorting", "transform", "comparison", "brackets", "knowledge"]
_COMMON: dict[str, Any] = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 32,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "eos_token_id": 0,
    "bos_token_id": None,
    "pad_token_id": 0,
}
_SIGMOID: dict[str, Any] = {
    "n_routed_experts": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 5,
    "intermediate_size": 64,
    "routed_scaling_factor": 2.5,
    "num_nextn_predict_layers": 0,
}
_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 32,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_hidden_layers": 4, "intermediate_size": 128, "num_experts": 32, "head_dim": 32},
    "glm4_moe": _SIGMOID | {"n_group": 1, "topk_group": 1, "head_dim": 32},
    "deepseek_v3": _SIGMOID | _MLA | {"n_group": 4, "topk_group": 2},
}
# Keys of the public config files that transformers does not write, or writes under another name.
_PUBLIC: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 32, "rope_theta": 10000.0},
    "glm4_moe": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_theta": 10000.0},
    "deepseek_v3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "rope_theta": 10000.0},
}
BALANCE = 2e-5  # step of the correction bias: experts stay unequal
DECISIVE = 0.15  # spread of a sigmoid router's first weights: without it every expert learns a little of everything


def build(family: str, seed: int) -> PreTrainedModel:
    """Make a model with fresh weights."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES[family]))
    if family == "qwen3_moe":
        config.output_router_logits, config.router_aux_loss_coef = True, 3e-4
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm", dtype=torch.float32)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            torch.nn.init.normal_(module.weight, std=DECISIVE)
    return model


class BiasBalancer:
    """Nudges each correction bias against the load of its expert, as sigmoid routers are trained."""

    def __init__(self, model: PreTrainedModel) -> None:
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.register_forward_hook(self._nudge)

    def _nudge(self, router: Any, _: Any, output: Any) -> None:
        if router.training:
            load = torch.bincount(output[2].flatten(), minlength=router.num_experts).float()
            router.e_score_correction_bias += BALANCE * torch.sign(load.mean() - load)


def train(model: PreTrainedModel, stream: torch.Tensor, steps: int, peak: float, seed: int) -> None:
    """Train with AdamW, a short warm-up and a cosine decay."""
    generator = torch.Generator().manual_seed(seed)
    matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=(0.9, 0.98), fused=True)
    model.train()
    start, total = time.time(), 0.0
    for step in range(1, steps + 1):
        rate = peak * min(step / 50, 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(0, len(stream) - LENGTH, (BATCH,), generator=generator)
        batch = torch.stack([stream[begin : begin + LENGTH] for begin in starts.tolist()])
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        total += loss.item()
        if step % 50 == 0:
            speed = step * BATCH * LENGTH / (time.time() - start)
            print(f"step {step:5d}  loss {total / 50:.3f}  {speed:,.0f} tokens/s", flush=True)
            total = 0.0


def save(model: PreTrainedModel, family: str, folder: Path) -> None:
    """Store in bf16, the correction bias in fp32, with a config like those of the public checkpoints."""
    model.to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            module.e_score_correction_bias.data = module.e_score_correction_bias.float()
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    for key in ("num_local_experts", "rope_parameters", "dtype", "output_router_logits", "mlp_layer_types"):
        config.pop(key, None)
    config |= {"torch_dtype": "bfloat16"} | _PUBLIC[family]
    (folder / "config.json").write_text(json.dumps(dict(sorted(config.items())), indent=2) + "\n")


def main() -> None:
    """Write the data files, or train one family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="write text files and tasks into this folder")
    parser.add_argument("--family", choices=sorted(FAMILIES))
    parser.add_argument("-o", "--output", type=Path, help="folder of the trained model")
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--rate", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.data:
        write_data(options.data, TASKS, options.seed)
    if options.family:
        corpus = load_corpus()
        tokenizer = train_tokenizer(corpus, options.seed)
        stream = training_stream(tokenizer, corpus, options.steps * BATCH * LENGTH // 2, options.seed)
        model = build(options.family, options.seed)
        size = sum(parameter.numel() for parameter in model.parameters())
        print(f"{options.family}: {size:,} parameters, {options.steps} steps of {BATCH * LENGTH} tokens", flush=True)
        BiasBalancer(model)
        train(model, torch.from_numpy(stream), options.steps, options.rate, options.seed)
        save(model, options.family, options.output)
        tokenizer.save_pretrained(options.output)


if __name__ == "__main__":
    main()
