"""Makes tokens of the texts of prepare_data.py: trains a byte-pair vocabulary on the code and encodes both texts.

    python make_tokens.py --texts DIRECTORY --out DIRECTORY [--vocabulary 49152] [--processes 16]

It needs the `tokenizers` package. Of every 64 documents the last is held out. Written are {code,prose}_{train,held}.bin
(uint16 tokens, each document ended by token 0), tokenizer.json and tokens.json: counts, bytes a token, SHA-256. What is
there already is kept.
"""

import argparse
import hashlib
import json
import lzma
import multiprocessing
import os
import time
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<|endoftext|>"  # token 0
HELD_OUT_EVERY = 64  # documents
CHUNK = 128  # documents that a process encodes at a time


def train_vocabulary(documents: list[str], size: int) -> Tokenizer:
    """A byte-level byte-pair vocabulary of `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    if tokenizer.get_vocab_size() != size:
        raise RuntimeError(f"the text gives {tokenizer.get_vocab_size()} tokens; --vocabulary is {size}")
    return tokenizer


_encoder: Tokenizer  # of a process


def _start(path: str) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder = Tokenizer.from_file(path)


def _encode(documents: list[str]) -> np.ndarray:
    pieces = []
    for encoding in _encoder.encode_batch_fast(documents):
        pieces.append(np.array([*encoding.ids, 0], dtype=np.uint16))
    return np.concatenate(pieces)


def encode(documents: list[str], tokenizer_path: Path, processes: int) -> np.ndarray:
    chunks = [documents[start : start + CHUNK] for start in range(0, len(documents), CHUNK)]
    with multiprocessing.get_context("spawn").Pool(processes, _start, (str(tokenizer_path),)) as pool:
        return np.concatenate(pool.map(_encode, chunks, chunksize=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", type=Path, required=True, help="directory with code.txt.xz and prose.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="directory to write to")
    parser.add_argument("--vocabulary", type=int, default=49152, help="tokens (default: %(default)s)")
    parser.add_argument("--sample-every", type=int, default=5, help="the vocabulary is made of every Nth document")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="(default: %(default)s)")
    arguments = parser.parse_args()
    if not 257 <= arguments.vocabulary <= 65536:
        parser.error(f"--vocabulary is {arguments.vocabulary}; allowed are 257 to 65536")
    description = arguments.out / "tokens.json"
    if description.exists():
        print(description.read_text())
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    facts: dict = {"sources": json.loads((arguments.texts / "sources.json").read_text())}
    tokenizer_path = arguments.out / "tokenizer.json"
    for kind in ("code", "prose"):
        text = lzma.decompress((arguments.texts / f"{kind}.txt.xz").read_bytes())
        if hashlib.sha256(text).hexdigest() != facts["sources"][kind]["sha256"]:
            raise RuntimeError(f"{kind}.txt.xz is not the text that sources.json names")
        documents = [part.decode("utf-8", "replace") for part in text.split(b"\0")[:-1]]
        if kind == "code":
            sample = [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1]
            train_vocabulary(sample[:: arguments.sample_every], arguments.vocabulary).save(str(tokenizer_path))
            print(f"{time.perf_counter() - start:.0f} s: vocabulary", flush=True)
        parts = {
            "train": [d for i, d in enumerate(documents) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1],
            "held": documents[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY],
        }
        for part, texts in parts.items():
            tokens = encode(texts, tokenizer_path, arguments.processes)
            tokens.tofile(arguments.out / f"{kind}_{part}.bin")
            facts[f"{kind}_{part}"] = {
                "tokens": len(tokens),
                "bytes_a_token": round(sum(len(d.encode()) for d in texts) / len(tokens), 3),
                "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
            }
        print(f"{time.perf_counter() - start:.0f} s: {kind}", flush=True)
    facts |= {
        "vocabulary": arguments.vocabulary,
        "tokenizer_sha256": hashlib.sha256(tokenizer_path.read_bytes()).hexdigest(),
        "seconds": round(time.perf_counter() - start, 1),
        "processes": arguments.processes,
    }
    description.write_text(json.dumps(facts, indent=2) + "\n")
    print(description.read_text())


if __name__ == "__main__":
    main()
