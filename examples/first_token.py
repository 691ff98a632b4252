"""Time to the first token and peak memory of a model packed at load, and of one that `layerskip
export --format packed` wrote.

    python examples/first_token.py make FOLDER [--hidden 2048 --inner 8192 --layers 16 --heads 32
    --kv-heads 8 --vocab 49152]
                                               [--type llama --values JSON]
    python examples/first_token.py measure MODEL... [--settings bf16,int8,int4] [--repeats N]
    [--tokens N] [--cold]

`make` writes random bf16 weights (by default a Llama of 1.07B, with a tied head) and the embedded
tokenizer. `--values` are further values of config.json, such as experts'. `measure` decodes in a
fresh process for each run and prints medians; times count from the end of the imports. `--cold`
drops the model's files from the page cache before each run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from measuring import head, line

FAMILY = {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096, "dtype": "bfloat16"}
SIZES = {"hidden": 2048, "inner": 8192, "layers": 16, "heads": 32, "kv-heads": 8, "vocab": 49152}


def make(arguments: argparse.Namespace) -> None:
    """A file for each layer, one at a time, so that a model larger than the memory can be made."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from layerskip_core.checkpoint.locate import ModelRef
    from layerskip_core.model import ModelSpec

    folder = Path(arguments.folder)
    source = Path(ModelRef.of("embedded").path)
    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        arguments.type, vocab_size=arguments.vocab, hidden_size=arguments.hidden, intermediate_size=arguments.inner,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.heads, num_key_value_heads=arguments.kv_heads,
        tie_word_embeddings=not arguments.untied, bos_token_id=1, eos_token_id=2, **FAMILY, **json.loads(arguments.values),
    )  # fmt: skip
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, folder / name)
    spec = ModelSpec.of(config)
    generator = torch.Generator().manual_seed(0)
    parts = dict[str, list[str]]()
    for name in spec.shapes:
        parts.setdefault(
            name.split(".")[2] if name.startswith("model.layers.") else name, []
        ).append(name)
    index: dict[str, str] = {}
    for number, names in enumerate(parts.values(), 1):
        weights = {name: torch.ones(spec.shapes[name], dtype=torch.bfloat16) for name in names}
        for weight in (weight for weight in weights.values() if weight.ndim > 1):
            weight.normal_(0, 0.02, generator=generator)
        file = f"model-{number:05}-of-{len(parts):05}.safetensors"
        save_file(weights, folder / file, {"format": "pt"})
        index |= dict.fromkeys(names, file)
    document = {"metadata": {"total_size": 2 * spec.parameters}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(document))
    print(f"{spec.parameters / 1e9:.2f}B weights in {folder}")


def once(arguments: argparse.Namespace) -> None:
    """In a process of its own: prints the figures of one run as JSON."""
    from layerskip_core.checkpoint.open import for_decoding
    from layerskip_core.config.decoding import DecodingConfig
    from layerskip_core.config.model import PackingConfig
    from layerskip_core.decoding import decode

    imported = memory("VmRSS")
    started = time.perf_counter()
    quantize = arguments.setting if arguments.setting in ("int8", "int4") else None
    loaded = for_decoding(arguments.model, "cpu", "auto", PackingConfig(quantize))
    ready = time.perf_counter()
    config = DecodingConfig("autoregressive", max_new_tokens=arguments.tokens)
    times = [
        time.perf_counter() for _ in decode(loaded.backend, [1, 5, 9, 33], config, frozenset())
    ]
    steps = [1000 * (after - before) for before, after in pairwise(times)] or [0.0]
    peak = memory("VmHWM")
    print(json.dumps([ready - started, times[0] - started, peak, peak - imported, median(steps)]))


def memory(name: str) -> float:
    """Megabytes of this process in memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(f"{name}:"))


def drop_from_cache(model: str) -> None:
    for path in Path(model).iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)  # pages that are not yet on disk cannot be dropped
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def measure(arguments: argparse.Namespace) -> None:
    head(
        "model",
        "weights",
        "load, s",
        "first token, s",
        "peak memory, MB",
        "above imports, MB",
        "a further token, ms",
    )
    for model in arguments.models:
        packed = (Path(model) / "packed.safetensors").exists()
        for setting in ("packed",) if packed else arguments.settings.split(","):
            runs = []
            for _ in range(arguments.repeats):
                if arguments.cold:
                    drop_from_cache(model)
                command = [
                    sys.executable,
                    __file__,
                    "once",
                    model,
                    setting,
                    "--tokens",
                    str(arguments.tokens),
                ]
                runs.append(
                    json.loads(
                        subprocess.run(
                            command, stdout=subprocess.PIPE, text=True, check=True
                        ).stdout
                    )
                )
            load, first, peak, above, step = map(median, zip(*runs, strict=True))
            line(
                Path(model).name,
                setting,
                f"{load:.2f}",
                f"{first:.2f}",
                f"{peak:,.0f}",
                f"{above:,.0f}",
                f"{step:.1f}",
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ways = parser.add_subparsers(dest="way", required=True)
    maker, measurer, one = (ways.add_parser(way) for way in ("make", "measure", "once"))
    maker.add_argument("folder")
    for name, size in SIZES.items():
        maker.add_argument(f"--{name}", type=int, default=size)
    maker.add_argument("--type", default="llama", help="model_type of transformers")
    maker.add_argument("--values", default="{}", metavar="JSON")
    maker.add_argument(
        "--untied", action="store_true", help="a head that is not tied to the embedding"
    )
    measurer.add_argument("models", nargs="+")
    measurer.add_argument("--settings", default="bf16,int8,int4")
    measurer.add_argument("--repeats", type=int, default=3)
    measurer.add_argument("--cold", action="store_true")
    one.add_argument("model")
    one.add_argument("setting")
    for way in (measurer, one):
        way.add_argument("--tokens", type=int, default=8)
    arguments = parser.parse_args()
    {"make": make, "measure": measure, "once": once}[arguments.way](arguments)


if __name__ == "__main__":
    main()
