"""Questions of five kinds, as pairs of context and continuation; and a small model that has learnt a little."""

from __future__ import annotations

import json
import random
from pathlib import Path

import torch
from tiny_folder import documents
from torch import Tensor

from megatron_ttl.checkpoint.hf_config import hf_config
from megatron_ttl.checkpoint.hf_weights import write_weights
from megatron_ttl.checkpoint.names import split_to_hf
from megatron_ttl.config.schema import ModelConfig
from megatron_ttl.model.llama import build_model
from megatron_ttl.tokenizer.tokenizer import Tokenizer

KINDS = ("choices", "letters", "sentences", "too long", "strange")
POSITIONS = 512
CONFIG = ModelConfig(hidden_size=128, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
                     num_key_value_heads=2, vocab_size=352, max_position_embeddings=POSITIONS)
_STRANGE = ("🙂🙃", "  dois  espaços", "ção\u0301", "日本語", "\tfim\n\n", "а б в", "x" * 40, "\u2028", "€ 3,50?", " ")

Question = tuple[str, list[str]]


def written_questions(count: int, seed: int = 0) -> list[Question]:
    """Compose questions of three to nine sentences with four answers of one sentence."""
    draw = random.Random(seed)
    texts = [text for text in documents(4 * count, seed) if len(text) > 40]
    return [(draw.choice(texts).partition("\n")[0], [draw.choice(texts).partition(".")[0] for _ in range(4)])
            for _ in range(count)]


def real_questions(tasks: Path, count: int) -> list[Question]:
    """Read questions with choices from samples of real tasks."""
    found = []
    for name in ("arc_challenge_pt", "arc_easy_pt", "mmlu_pt_valdev"):
        with open(tasks / f"{name}.sample.jsonl", encoding="utf-8") as lines:
            found += [(row["question"], row["choices"]) for row in map(json.loads, lines)]
    return random.Random(0).sample(found, count)


def pairs_of(kind: str, questions: list[Question], seed: int = 0) -> list[tuple[str, str]]:
    """Return what a model is asked about these questions."""
    draw = random.Random(seed)
    letters = "ABCD"
    shown = "\n\n".join(f"Pergunta: {question[:60]}\nResposta: {choices[0][:30]}" for question, choices in questions[:3])
    pairs = []
    for question, choices in questions:
        listed = "\n".join(f"{letter}. {choice[:30]}" for letter, choice in zip(letters, choices, strict=False))
        whole = {"choices": f"Pergunta: {question}\nResposta:", "letters": f"{shown}\n\n{question}\n{listed}\nResposta:",
                 "sentences": "", "too long": " ".join(draw.choice(questions)[0] for _ in range(30)),
                 "strange": draw.choice((*_STRANGE, "")) + question[:25] + draw.choice((*_STRANGE, "", "  ", "\n"))}[kind]
        for number, choice in enumerate(choices[:4]):
            end = {"letters": f" {letters[number]}", "sentences": f"{question[:80]} Sim, {choice}",
                   "strange": draw.choice(_STRANGE) + choice[:8]}.get(kind, f" {choice}")
            pairs.append((whole, end))
    return pairs


def taught_weights(tokenizer: Tokenizer, steps: int = 80) -> dict[str, Tensor]:
    """Train `CONFIG` on a few documents: its answers are words."""
    model = build_model(CONFIG, seed=11)
    ids = [1, *(number for text in tokenizer.encode_batch(documents(200, 3)) for number in (*text, 2, 1))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(5)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10)
        starts = torch.randint(len(ids) - 49, (8,), generator=generator).tolist()
        batch = torch.tensor([ids[start : start + 49] for start in starts])
        loss = torch.nn.functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {hf: piece.detach() for name, tensor in model.state_dict().items()
            for hf, piece in split_to_hf(name, tensor, CONFIG).items()}


def write_taught_folder(folder: Path, weights: dict[str, Tensor], tokenizer: Tokenizer, add_bos: bool = True) -> Path:
    """Write a model folder with these weights."""
    folder.mkdir()
    write_weights(folder, weights, CONFIG, torch.float32, 10**9, lambda _: None)
    (folder / "config.json").write_text(json.dumps(hf_config(CONFIG, tokenizer, "float32")))
    for file in tokenizer.directory.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "add_bos_token": add_bos}))
    return folder
