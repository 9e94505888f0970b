"""What gpu_bench measures, for transformers: fp16, random weights, Llama-2-7b's shape."""

import json
import time

import torch
import transformers


def seconds(model, ids: torch.Tensor, n_new: int) -> float:
    """The fastest of three runs that generate n_new tokens."""
    best = float("inf")
    for _ in range(3):
        torch.cuda.synchronize()
        begun = time.perf_counter()
        model.generate(
            ids, max_new_tokens=n_new, min_new_tokens=n_new, do_sample=False, pad_token_id=0
        )
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


def main() -> None:
    """Prints one JSON object."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(max_position_embeddings=4096)  # the defaults are Llama-2-7b's
    with torch.device("cuda"):
        torch.set_default_dtype(torch.float16)
        model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(3, 32000, (1, 512), device="cuda")
    with torch.no_grad():
        seconds(model, ids[:, :32], 8)
        prefill = seconds(model, ids, 1)
        decode = (seconds(model, ids[:, :32], 129) - seconds(model, ids[:, :32], 1)) / 128
    print(
        json.dumps(
            {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "gpu": torch.cuda.get_device_name(),
                "decode_tokens_s": 1 / decode,
                "prefill_tokens_s": 512 / prefill,
            }
        )
    )


if __name__ == "__main__":
    main()
