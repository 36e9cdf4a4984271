"""Quick tests of the examples, each run small with the real libraries: python -m pytest -q examples"""
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import code_search

code_search.standard_library = functools.cache(code_search.standard_library)  # it takes seconds to read


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def batches_seen(trainer) -> list:
    """The texts of each batch that the trainer's steps get, filled while it trains."""
    seen, step = [], trainer.training_step

    def training_step(model, inputs, *rest):
        seen.append(inputs["anchor_input_ids"].tolist())
        return step(model, inputs, *rest)
    trainer.training_step = training_step
    return seen


def some_pairs(n: int, start: int = 0) -> dict:
    names = [f"{a} {b} {c}" for a in "abcdefgh" for b in "ijklmnop" for c in "qrstuvwx"]
    return {"anchor": names[start:start + n], "positive": [x[::-1] for x in names[start:start + n]]}


def make_trainer(out, train, refresh="window", callback=True, evaluate=None, model=None, loss=None, **args):
    import sentence_transformers_pairs as example
    from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
    torch.manual_seed(0)
    model = model or example.static_model([" ".join("abcdefghijklmnopqrstuvwx")], 16)
    hard = example.hard_batches(model, train, refresh=refresh, k=3)
    arguments = SentenceTransformerTrainingArguments(**{
        "output_dir": str(out), "num_train_epochs": 3, "per_device_train_batch_size": 8, "learning_rate": 0.1,
        "batch_sampler": hard, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "use_cpu": True} | args)
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=train, eval_dataset=evaluate,
                                         loss=loss or MultipleNegativesRankingLoss(model),
                                         callbacks=[hard] if callback else [])
    return trainer, hard


def datasets(two: bool):
    from datasets import Dataset, DatasetDict
    if not two:
        return Dataset.from_dict(some_pairs(84))
    return DatasetDict(one=Dataset.from_dict(some_pairs(84)), two=Dataset.from_dict(some_pairs(52, 100)))


@pytest.mark.parametrize("refresh, two, step, args", [
    ("window", False, 14, {}), ("window", False, 10, {}), ("epoch", False, 14, {}), ("window", True, 19, {}),
    ("window", True, 19, {"multi_dataset_batch_sampler": "round_robin"}),
    ("window", False, 4, {"gradient_accumulation_steps": 4}), ("free", False, 14, {}), ("free", True, 19, {}),
    ("free", False, 4, {"gradient_accumulation_steps": 4}),
    ("free", False, 14, {"dataloader_num_workers": 1}),
    ("window", False, 14, {"dataloader_num_workers": 1})])
def test_a_resumed_run_gets_the_batches_that_would_have_come(tmp_path, refresh, two, step, args):
    args |= {"save_strategy": "steps", "save_steps": step}
    whole, _ = make_trainer(tmp_path, datasets(two), refresh, **args)
    expected = batches_seen(whole)
    whole.train()
    again, _ = make_trainer(tmp_path, datasets(two), refresh, **args)
    torch.manual_seed(5)
    seen = batches_seen(again)
    again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    done = len(expected) - len(seen)
    assert 0 < done < len(expected) and seen == expected[done:]
    assert again.state.global_step == whole.state.global_step
    for a, b in zip(whole.model.parameters(), again.model.parameters()):
        torch.testing.assert_close(a, b)


def test_equal_texts_share_no_batch(tmp_path):
    from datasets import Dataset
    rows = some_pairs(96)
    rows["anchor"][:4] = ["a i q"] * 4
    rows["positive"][3:7] = ["x p h"] * 4  # rows 0 to 6 hang together
    train = Dataset.from_dict(rows)
    trainer, hard = make_trainer(tmp_path, train)
    trainer.train()
    sampler = hard.samplers[0]
    for _ in range(3):
        assert all(sum(row < 7 for row in batch) < 2 for batch in sampler)


def test_batches_are_hard_and_evaluation_gets_plain_ones(tmp_path):
    from datasets import Dataset
    evaluate = Dataset.from_dict(some_pairs(20, 200))
    trainer, hard = make_trainer(tmp_path, datasets(False), evaluate=evaluate, eval_strategy="epoch")
    trainer.train()
    assert len(trainer.state.log_history) >= 3 and list(hard.samplers) == [0]
    plain = trainer.get_eval_dataloader().batch_sampler
    assert list(plain) == [list(range(at, min(at + 8, 20))) for at in (0, 8, 16)] and len(plain) == 3
    list(zip(hard.samplers[0], range(2)))
    losses = hard.samplers[0].window_losses()
    assert losses["chosen"].mean() > 2 * losses["random"].mean()


@pytest.mark.parametrize("prompts, two, expected", [
    ("Q: ", False, ("Q: ", "Q: ")), ({"anchor": "A: "}, False, ("A: ", "")),
    ({"one": {"anchor": "A: "}, "two": "T: "}, True, ("A: ", ""))])
def test_the_sampler_embeds_with_the_prompts_of_training(tmp_path, prompts, two, expected):
    trainer, hard = make_trainer(tmp_path, datasets(two), prompts=prompts)
    given, encode = [], trainer.model.encode
    trainer.model.encode = lambda texts, prompt, **rest: given.append(prompt) or encode(
        texts, prompt=prompt, **rest)
    trainer.train()
    assert set(zip(given[::2], given[1::2])) == ({expected, ("T: ", "T: ")} if two else {expected})


def small_bert(folder):
    """A transformer made from nothing, without dropout, as a folder that SentenceTransformer reads."""
    import sentence_transformers_pairs as example
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    tokenizer = example.static_model([" ".join("abcdefghijklmnopqrstuvwx")], 16).tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[UNK]")
    config = BertConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                        intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("name, options", [
    ("MultipleNegativesRankingLoss", {}), ("CachedMultipleNegativesRankingLoss", {"mini_batch_size": 3}),
    ("MatryoshkaLoss", {"matryoshka_dims": [16, 8]})])
def test_free_is_what_the_steps_embed(tmp_path, name, options):
    from datasets import Dataset
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer import losses
    model = SentenceTransformer(small_bert(tmp_path / "bert"), device="cpu")
    if name == "MatryoshkaLoss":
        options["loss"] = losses.MultipleNegativesRankingLoss(model)
    rows = some_pairs(84) | {"negative": some_pairs(84, 100)["anchor"]}
    trainer, hard = make_trainer(tmp_path, Dataset.from_dict(rows), "free", model=model, learning_rate=0.0,
                                 loss=getattr(losses, name)(model, **options), eval_strategy="epoch",
                                 evaluate=Dataset.from_dict(some_pairs(20, 200)))
    trainer.train()
    assert hard.samplers[0].seen.all() and not model._forward_hooks
    for column, stored in zip(("anchor", "positive"), hard.samplers[0].uv.unbind(1)):
        expected = model.encode(rows[column], convert_to_tensor=True)
        same, other = (torch.nn.functional.cosine_similarity(stored, x)
                       for x in (expected, expected.roll(1, 0)))
        assert same.min() > 1 - 1e-5 and other.max() < 1 - 1e-4


@pytest.mark.parametrize("refresh, step", [("window", 8), ("free", 12)])
def test_two_processes_deal_out_each_batch_once_and_go_on(tmp_path, refresh, step):
    script = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import torch, test_examples as t
from datasets import Dataset
torch.set_num_threads(1)
def run(path=None):
    rows = t.some_pairs(108)
    rows["anchor"][:4] = ["a i q"] * 4
    trainer, hard = t.make_trainer({str(tmp_path)!r}, Dataset.from_dict(rows), {refresh!r},
                                   save_strategy="steps", save_steps={step})
    seen = t.batches_seen(trainer)
    trainer.train(resume_from_checkpoint=path)
    parameters = [p.detach() for p in trainer.model.parameters()]
    return seen, hard.samplers[0].uv, [b for _, b in hard.fetched], trainer.args.process_index, parameters
whole = run()
again = run({str(tmp_path)!r} + "/checkpoint-{step}")
torch.save((whole, again), {str(tmp_path)!r} + f"/{{whole[3]}}.pt")
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone",
                           "--nproc-per-node=2", tmp_path / "run.py"], capture_output=True, text=True,
                          timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    (one, one_again), (two, two_again) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(one[0]) == len(two[0]) == 3 * 6  # 13 batches of 8 an epoch, the last one left out
    assert one[2] == two[2] and len(set(sum(one[2], []))) == 104
    assert all(sum(row < 4 for row in batch) < 2 for batch in one[2])
    assert one_again[0] == one[0][step:] and two_again[0] == two[0][step:] and one[0] != two[0]
    if refresh == "free":
        torch.testing.assert_close(one[1], two[1])
    for a, b, c in zip(one[4], two[4], one_again[4]):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_what_is_forgotten_is_said(tmp_path):
    import sentence_transformers_pairs as example
    trainer, _ = make_trainer(tmp_path, datasets(False), callback=False)
    with pytest.raises(ValueError, match="callbacks="):
        trainer.train()
    trainer, hard = make_trainer(tmp_path, datasets(True), "free")
    trainer.get_train_dataloader()
    for gpus, processes in (2, 1), (1, 2):
        with pytest.raises(ValueError, match="or give 'window'"):
            hard.on_train_begin(SimpleNamespace(prompts=None, n_gpu=gpus, world_size=processes), None, None)
    trainer, _ = make_trainer(tmp_path, datasets(False))
    trainer.train_dataset = datasets(False)
    with pytest.raises(ValueError, match="give both"):
        trainer.train()
    with pytest.raises(ValueError, match="'window', 'epoch' or 'free'"):
        example.hard_batches(None, datasets(False), refresh="step")


def test_code_search_splits_by_module_and_keeps_equal_texts_apart(tmp_path):
    modules = code_search.standard_library()
    train, test = code_search.pairs()
    assert len(test) == 1000 and len(train) > 2500
    assert not {x for pair in test for x in pair} & {x for pair in train for x in pair}
    assert all(len({pair[side] for pair in test}) == 1000 for side in (0, 1))
    owners = Counter(pair for pairs in modules.values() for pair in set(pairs))
    of = {pair: name for name, pairs in modules.items() for pair in pairs if owners[pair] == 1}
    assert {of.get(pair) for pair in test} & {of.get(pair) for pair in train} <= {None}
    a, b = ("x", "y", "x", "z", "u", "v"), ("1", "2", "3", "3", "4", "5")
    groups = code_search.same(a, b)
    assert len(set(groups.tolist())) == 4 and groups[0] == groups[2] == groups[3]


def test_code_search_learns_and_draws(tmp_path):
    curves = code_search.main(epochs=3, seeds=1, limit=640, out=tmp_path)
    assert (tmp_path / "code_search.png").stat().st_size > 5000
    for curve in curves.values():
        assert curve.shape == (1, 3, 4) and (curve[0, :, 0] == [20, 40, 60]).all()
        assert curve[0, -1, 2] > curve[0, 0, 2] > 0.1 and (curve[0, 1:, 1] > curve[0, :-1, 1]).all()


def test_lightning_under_ddp_deals_out_each_batch_once(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import lightning_clip, torch
seen, update = [], lightning_clip.Update.on_train_batch_end
def watch(self, trainer, module, outputs, batch, index):
    seen.append(batch[0].tolist())
    update(self, trainer, module, outputs, batch, index)
    sampler, rank = trainer.datamodule.sampler, trainer.global_rank
    torch.save((seen, sampler.uv, sampler.seen.sum(), [p.detach() for p in module.parameters()]),
               {str(tmp_path)!r} + f"/{{rank}}.pt")
lightning_clip.Update.on_train_batch_end = watch
lightning_clip.main(devices=2, epochs=3, count=512)
"""
    (tmp_path / "run.py").write_text(script)
    done = subprocess.run([sys.executable, tmp_path / "run.py"], capture_output=True, text=True, timeout=200,
                          cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of 1,024 new images") == 1
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert len(one[0]) == len(two[0]) == 3 * 8 and one[2] == two[2] == 512
    for epoch in range(3):
        rows = sum(one[0][8 * epoch:8 * epoch + 8] + two[0][8 * epoch:8 * epoch + 8], [])
        assert sorted(rows) == list(range(512))
    labels = torch.arange(512) % 128
    assert all(len(labels[batch].unique()) == 32 for batch in one[0][8:] + two[0][8:])
    torch.testing.assert_close(one[1], two[1])
    torch.testing.assert_close(one[3], two[3])


def test_lightning_goes_on_from_a_checkpoint(tmp_path):
    import lightning
    import lightning_clip

    class Seen(lightning.Callback):
        def __init__(self):
            self.rows = []

        def on_train_batch_start(self, trainer, module, batch, index):
            self.rows.append(batch[0].tolist())

    def run(epochs, path=None):
        lightning.seed_everything(0, verbose=False)
        seen = Seen()
        trainer = lightning.Trainer(accelerator="cpu", max_epochs=epochs, use_distributed_sampler=False,
                                    callbacks=[lightning_clip.Update(), seen], logger=False,
                                    enable_checkpointing=False, enable_progress_bar=False)
        trainer.fit(lightning_clip.Clip(), datamodule=lightning_clip.Pairs(256, "spectral"), ckpt_path=path)
        return trainer, seen.rows
    trainer, _ = run(2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert run(4, tmp_path / "two.ckpt")[1] == run(4)[1][16:]


def test_lightning_trains():
    import lightning_clip
    assert lightning_clip.main(epochs=8, count=2048) > 5 / 128


def test_similar_classes_come_together_and_each_sample_in_its_turn():
    from metric_learning import SimilarClasses
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(32, (1600,), generator=generator)
    centres = torch.randn(4, 16, generator=generator)[torch.arange(32) % 4]  # of 32 classes, 4 kinds
    z = centres[labels] + 0.3 * torch.randn(1600, 16, generator=generator)
    sampler = SimilarClasses(labels, 8, 4, lambda: z)
    batches = list(sampler)
    assert len(batches) == len(sampler) == 1600 // 32
    for batch in batches:
        classes, counts = labels[batch].unique(return_counts=True)
        assert (counts == 4).all() and len(classes) == 8 and len(set((classes % 4).tolist())) == 1
    for label in range(32):  # none a second time before each came once, but for those left over
        rows = [row for batch in batches for row in batch if labels[row] == label]
        size = int((labels == label).sum()) // 4 * 4
        rounds = [rows[at:at + size] for at in range(0, len(rows), size)]
        assert all(len(set(some)) == len(some) for some in rounds)
    mixed = list(SimilarClasses(labels, 8, 4))
    assert sum(len(set((labels[batch] % 4).tolist())) > 1 for batch in mixed) > 45
    with pytest.raises(ValueError, match="32 classes"):
        SimilarClasses(labels, 33, 4)
    with pytest.raises(ValueError, match="samples a class"):
        SimilarClasses(labels, 8, 100)


def test_metric_learning_trains():
    import metric_learning
    assert metric_learning.main(epochs=2, count=1280) > 0.15


def test_sentence_transformers_trains(tmp_path):
    import sentence_transformers_pairs as example
    before, _ = example.main("no_duplicates", epochs=1, rate=1e-9, limit=640, out=tmp_path)
    mrr, first = example.main(refresh="free", limit=640, out=tmp_path)
    assert before + 0.02 < mrr < 1 and first < mrr
