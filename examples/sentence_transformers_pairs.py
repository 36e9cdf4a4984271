"""Pairs of texts in the SentenceTransformerTrainer. Copy hard_batches and _Resumable as they are.

    python examples/sentence_transformers_pairs.py    # on Python's standard library; prints MRR and R@1
"""
import sys
from pathlib import Path

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import TrainerCallback

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # not needed beside a copy of samplers.py
from samplers import ContrastiveBatchSampler


class hard_batches(TrainerCallback):
    """For SentenceTransformerTrainingArguments(batch_sampler=...) and the trainer's callbacks=[...], both.

    train: the Dataset or DatasetDict to train on; others, to evaluate on, get plain batches. refresh: embed a
    "window" at a time, or all at the start of each "epoch". Rows with equal texts in one of the columns share
    no batch. Prompts are those of the arguments. A checkpoint holds sampler.pt, and resume_from_checkpoint
    goes on with the batches that would have come. options: ContrastiveBatchSampler's; temperature: 1 / scale
    of the loss."""
    FILE = "{}/checkpoint-{}/sampler.pt"

    def __init__(self, model, train, columns=("anchor", "positive"), refresh="window", **options):
        if refresh not in ("window", "epoch"):
            raise ValueError(f"refresh is {refresh!r}; give 'window' or 'epoch'")
        self.model, self.columns, self.samplers, self.fetched, self.prompts = model, columns, {}, None, None
        self.train = list(train.values()) if isinstance(train, dict) else [train]
        self.options = {"temperature": 0.05, "at_once": refresh == "epoch"} | options

    def __call__(self, dataset, batch_size, drop_last, valid_label_columns=None, generator=None, seed=0):
        name = next((i for i, known in enumerate(self.train) if known is dataset), None)
        if name is None:
            return BatchSampler(SequentialSampler(dataset), batch_size, drop_last)
        n, B, every = len(dataset), min(batch_size, len(dataset)), dataset[:]
        # A graph of rows and texts: rows that hang together are no negatives of each other.
        texts = [np.unique(every[c], return_inverse=True)[1] + n * i for i, c in enumerate(self.columns, 1)]
        edges = np.tile(np.arange(n), len(texts)), np.concatenate(texts)
        graph = coo_array((np.ones(len(edges[0])), edges), shape=2 * [n * (len(texts) + 1)])
        options = {"k": max(1, min(40, n // B, 4096 // B)), "seed": seed,
                   "exclude": connected_components(graph, directed=False)[1][:n]} | self.options
        sampler = _Resumable(n, B, embed=lambda rows: self.embed(dataset[rows.tolist()]), **options)
        sampler.tell, self.samplers[name] = lambda: self.fetched.append(name), sampler
        return sampler

    def embed(self, batch):
        if self.fetched is None:
            raise ValueError("hard_batches is no callback of the trainer; give it in callbacks=[...] as well")
        prompts = self.prompts  # one, or by column, or by data set, as for the trainer
        if isinstance(prompts, dict) and "dataset_name" in batch:
            prompts = prompts.get(batch["dataset_name"][0], prompts)
        by_column = prompts if isinstance(prompts, dict) else dict.fromkeys(self.columns, prompts)
        return [self.model.encode(batch[c], prompt=by_column.get(c) or "", convert_to_tensor=True,
                                  show_progress_bar=False) for c in self.columns]

    def on_train_begin(self, args, state, control, **_):
        self.prompts = args.prompts
        if state.global_step:  # resumed
            for name, saved in torch.load(self.FILE.format(args.output_dir, state.global_step)).items():
                self.samplers[name].load_state_dict(saved)

    def on_epoch_begin(self, args, state, control, **_):
        self.fetched, self.trained = [], 0  # the data set of each batch fetched, which runs ahead of training

    def on_step_end(self, args, state, control, **_):
        self.trained += args.world_size

    on_substep_end = on_step_end  # where gradients accumulate

    def on_save(self, args, state, control, **_):
        behind = self.fetched[self.trained:]
        states = {name: sampler.state_dict(behind.count(name)) for name, sampler in self.samplers.items()}
        if state.is_world_process_zero:
            torch.save(states, self.FILE.format(args.output_dir, state.global_step))

    def __reduce__(self):  # the trainer pickles its arguments, which need no model
        return str, ("hard_batches",)


class _Resumable(ContrastiveBatchSampler):
    def __iter__(self):
        yield from [[0]] * (self.step if self.loaded else 0)  # the trainer skips what it has trained on
        for rows in super().__iter__():
            self.tell()
            yield rows


def static_model(texts: list[str], dim: int = 128):
    """A small encoder made from nothing. For a real one: SentenceTransformer("name or folder")."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    inside = normalizers.Replace(Regex(r"(?<=[a-z])(?=[A-Z])"), " ")  # a name's words
    tokenizer.normalizer = normalizers.Sequence([inside, normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[a-z]+|\d+"), "removed", invert=True)
    tokenizer.train_from_iterator(texts, trainers.WordLevelTrainer(special_tokens=["[UNK]"]))
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=dim)])


def main(method="hard", epochs=5, rate=0.02, seed=0, limit=None, out=ROOT / "runs/st", **options):
    """Trains with a batch_sampler of the trainer, or "hard" ones with these options; MRR and R@1 of 1,000."""
    from code_search import pairs
    from datasets import Dataset
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    train, test = (Dataset.from_dict(dict(zip(("anchor", "positive"), zip(*p[:limit])))) for p in pairs())
    torch.manual_seed(seed)
    model = static_model([*train["anchor"], *train["positive"]])
    hard = hard_batches(model, train, **options)
    args = SentenceTransformerTrainingArguments(
        str(out), num_train_epochs=epochs, per_device_train_batch_size=32, learning_rate=rate, seed=seed,
        batch_sampler=hard if method == "hard" else method, save_strategy="no", report_to="none")
    loss = MultipleNegativesRankingLoss(model)
    SentenceTransformerTrainer(model, args, train_dataset=train, loss=loss, callbacks=[hard]).train()
    u, v = (model.encode(test[c], normalize_embeddings=True, convert_to_tensor=True) for c in test.features)
    rank = 1 + (u @ v.T > (u * v).sum(1, keepdim=True) + 1e-6).sum(1)
    return (1 / rank).mean().item(), (rank == 1).float().mean().item()


if __name__ == "__main__":
    for name in ("no_duplicates", "hard"):
        print("%s: MRR %.3f, R@1 %.3f" % (name, *main(name)))
