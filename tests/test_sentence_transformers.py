"""sentence-transformers' training, its `save` and its `encode`, on a model that becomes binary (own marker).

pip install --no-deps sentence-transformers==6.2.0
python -m pytest -m sentence_transformers
"""

import csv
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import assert_binary
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, BertTokenizerFast

from stompp_hf.surgery.members import binary_layers

pytestmark = pytest.mark.sentence_transformers

HERE = Path(__file__).parent
WORDS = ["the", "a", "cast", "plot", "film", "actor", "was", "very", "not", "dull", "great", "good", "##ly", "and"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
SENTENCES = ["the cast was great", "a film not very good", "dull"]
RELOAD = """
import sys, numpy, stompp_hf
from sentence_transformers import SentenceTransformer
numpy.save(sys.argv[2], SentenceTransformer(sys.argv[1]).encode(sys.argv[3:]))
"""


def elsewhere(folder: Path, out: Path) -> np.ndarray:
    """What a saved model encodes in another process."""
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", RELOAD, str(folder), str(out / "encoded.npy"), *SENTENCES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return np.load(out / "encoded.npy")


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT with a vocabulary of word pieces; no hub is asked for either."""
    folder = tmp_path_factory.mktemp("start")
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *WORDS])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    pieces.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    BertTokenizerFast(tokenizer_object=pieces, model_max_length=32).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=32,
        )
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def trained(start: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The script, run to its end: its model and its output folder."""
    pytest.importorskip("sentence_transformers")
    folder, dice = tmp_path_factory.mktemp("sts"), np.random.default_rng(0)
    with (folder / "pairs.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sentence1", "sentence2", "score"])
        for _ in range(64):
            first, second = (list(dice.choice(WORDS, 6)) for _ in range(2))
            writer.writerow([" ".join(first), " ".join(second), len({*first} & {*second}) / 6])
    argv, sys.argv = sys.argv, ["train_sts.py", str(start), str(folder / "pairs.csv"), str(folder / "out")]
    try:
        return runpy.run_path(str(HERE / "scripts" / "train_sts.py"))["main"](), folder / "out"
    finally:
        sys.argv = argv


def test_sts_training_ends_binary_and_reloads_in_another_process(trained: tuple[Any, Path], tmp_path: Path) -> None:
    model, out = trained
    layers = binary_layers(model)
    assert len(layers) == 12
    for layer in layers.values():
        assert layer.stage_state == "frozen"
        assert_binary(layer)
    encoded = model.encode(SENTENCES)
    assert np.isfinite(encoded).all()
    assert np.array_equal(elsewhere(out / "final", tmp_path), encoded)
    assert np.array_equal(elsewhere(out / "checkpoint-12", tmp_path), encoded)  # Trainer's own


def test_packed(trained: tuple[Any, Path], tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    from stompp_hf import pack_model

    model = SentenceTransformer(str(trained[1] / "final"))
    encoded = model.encode(SENTENCES)
    pack_model(model)
    assert np.array_equal(model.encode(SENTENCES), encoded)
    model.save_pretrained(str(tmp_path / "packed"))
    assert np.array_equal(elsewhere(tmp_path / "packed", tmp_path), encoded)


def test_a_cross_encoder(start: Path, tmp_path: Path) -> None:
    """The package's other kind of model, around a classifier."""
    from sentence_transformers import CrossEncoder

    from stompp_hf import Progression, binarize_model, calibrate

    torch.manual_seed(0)
    model = CrossEncoder(str(start), num_labels=1)
    pairs = [[SENTENCES[0], SENTENCES[1]], [SENTENCES[2], SENTENCES[0]]]
    plain = model.predict(pairs)
    binarize_model(model)
    assert np.array_equal(model.predict(pairs), plain)
    Progression(model, 1).step(1)
    texts = model.tokenizer([" ".join(pair) for pair in pairs], return_tensors="pt", padding=True)
    calibrate(model, [dict(texts)])  # the plan is the classifier's: batches are what that is called with
    scores = model.predict(pairs)
    model.save_pretrained(str(tmp_path))
    assert np.array_equal(CrossEncoder(str(tmp_path)).predict(pairs), scores)
