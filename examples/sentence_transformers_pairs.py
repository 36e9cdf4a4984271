"""Pairs of texts in the SentenceTransformerTrainer: hard_batches.py against the trainer's own batches.

    python examples/sentence_transformers_pairs.py    # on Python's standard library; prints MRR and R@1
"""
from pathlib import Path

import torch
from code_search import pairs
from datasets import Dataset
from hard_batches import hard_batches
from sentence_transformers import (
    SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

OUT = Path(__file__).resolve().parents[1] / "runs/st"


def static_model(texts: list[str], dim: int = 128):
    """A small encoder made from nothing. For a real one: SentenceTransformer("name or folder")."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inside = normalizers.Replace(Regex(r"(?<=[a-z])(?=[A-Z])"), " ")  # a name's words
    tokenizer.normalizer = normalizers.Sequence([inside, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|\d+"), "removed", invert=True)
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)])


def main(method="hard", epochs=5, batch_size=32, rate=0.4, seed=0, limit=None, out=OUT, **options):
    """Trains with a batch_sampler of the trainer, or "hard" ones with these options; MRR and R@1 of 1,000.

    rate: the best of eleven for random batches of this encoder; for a real model 2e-5 is usual."""
    train, test = (Dataset.from_dict(dict(zip(("anchor", "positive"), zip(*p[:limit])))) for p in pairs())
    torch.manual_seed(seed)
    model = static_model([*train["anchor"], *train["positive"]])
    hard = hard_batches(model, train, **options)
    args = SentenceTransformerTrainingArguments(
        str(out), num_train_epochs=epochs, per_device_train_batch_size=batch_size, learning_rate=rate,
        batch_sampler=hard if method == "hard" else method, seed=seed, save_strategy="no", report_to="none")
    loss, callbacks = MultipleNegativesRankingLoss(model), [hard] if method == "hard" else []
    SentenceTransformerTrainer(model, args, train_dataset=train, loss=loss, callbacks=callbacks).train()
    u, v = (model.encode(test[c], normalize_embeddings=True, convert_to_tensor=True) for c in test.features)
    rank = 1 + (u @ v.T > (u * v).sum(1, keepdim=True) + 1e-6).sum(1)
    return (1 / rank).mean().item(), (rank == 1).float().mean().item()


if __name__ == "__main__":
    for name, options in ("batch_sampler", {}), ("hard", {}), ("hard", {"refresh": "free"}):
        print("%s %s: MRR %.3f, R@1 %.3f" % (name, options or "", *main(name, **options)))
