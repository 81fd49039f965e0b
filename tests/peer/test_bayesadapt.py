"""The official code, SRI-CSL/BayesAdapt, at two commits: its numbers in docs/method.md.

Every number comes from running the commit's own modules, unedited. SCALABL_BAYESADAPT names a
folder with a checkout of each commit, named after it (docs/verification.md has the commands).
Replaced are only the downloads of data sets, the clocks of CUDA, and, where a test says so, the
logits. `pytest -s` prints the largest differences.
"""

from __future__ import annotations

import importlib
import os
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from scalabl_ref import Noise, adapters
from scalabl_ref.training.schedule import kl_period, kl_weight, warmup_linear

from ..interop.samples import LETTERS, TOKENS, bound, bring
from ..models import tiny_folder
from ..test_official_code import BLOCKS, SIGMA, STEPS, N, S, numbers, some_answers
from ..tools.test_convert import convert_hf
from .test_peft import compare, randomise

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("default")]
transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

NEEDS = ("accelerate", "asdl", "bitsandbytes", "datasets", "hydra", "ipdb", "pandas", "PIL",
         "torchmetrics", "wandb")  # fmt: skip


@contextmanager
def modules_of(folder):
    """Imports from a checkout, whose names other programs use too: forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        for name in set(sys.modules) - before:
            if str(folder) in (getattr(sys.modules[name], "__file__", None) or ""):
                del sys.modules[name]


class Questions(torch.utils.data.Dataset):
    """In place of a data set of 3843000, which would be downloaded."""

    def __init__(self, rows=10, labels="ABC", split=None):
        self.rows, self.labels, self.split = rows, list(labels), split

    def __len__(self):
        return self.rows

    def __getitem__(self, i):
        return {"prompt": f"{i} {'xyz'[i % 3]}", "label": i % 3, "question_id": str(i)}


class Release:
    """A commit: what its tests need, by one name for both."""

    def __init__(self, folder, hf):
        self.folder, self.hf = folder, hf

    def linear(self, d_in=16, rank=2):
        return self.ScalaBLLinear(d_in, rank, s_sigma_init_eps=0.05)

    def kl(self, s, sigma):
        """Of the layer, with the prior N(1e-8, 1) that its code says."""
        linear = self.linear(16, len(s)).to(s.dtype)
        linear.log_s.data, linear.log_s_sigma.data = s.log(), sigma.log()
        linear.log_p_mu.fill_(1e-8).log_()
        linear.log_p_sigma.zero_()
        return linear.kl_div.item()


class First(Release):
    """ef51e8a, the first release."""

    commit = "ef51e8a"

    def __init__(self, folder, hf):
        super().__init__(folder, hf)
        self.wrapper = importlib.import_module("modelwrappers.scalabl")
        self.data = importlib.import_module("dataset.utils.dsets")
        self.ScalaBLLinear = self.wrapper.ScalaBLLinear

    def args(self, rank=3):
        """Of its command line, as scripts/scalabl/scalabl-qwen7b-id.sh has them."""
        return self.wrapper.get_parser().parse_args(
            "--dataset-type mcdataset --dataset obqa --model-type causallm --modelwrapper scalabl "
            f"--model {self.hf} --lr 1e-4 --batch-size 4 --opt adamw --warmup-ratio 0.06 "
            f"--lora-r {rank} --lora-alpha {2 * rank} --max-train-steps {STEPS} --nowand "
            "--eval-per-steps 1000000 --bayes-klreweighting --bayes-eps 0.05 --bayes-beta 0.2 "
            "--bayes-gamma 8 --bayes-kllr 0.2 --bayes-datasetrescaling".split()
        )

    def model(self):
        """As its run/main.py and models/causallm.py make it; in bfloat16, as there."""
        accelerate = importlib.import_module("accelerate")
        args = self.args()
        args.outdim, args.num_samples, args.epoch = 4, N, 0
        base = transformers.AutoModelForCausalLM.from_pretrained(self.hf, dtype=torch.bfloat16)
        config = peft.LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=6,
                                 target_modules=["q_proj", "v_proj", "lm_head"])  # fmt: skip
        inner = peft.get_peft_model(base, config)
        model = self.wrapper.ScalaBL(inner, config, args, accelerate.Accelerator(cpu=True))
        model.log, model.wandb_logger = [], None
        return model

    def layers(self, model):
        return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]

    def prepare(self, model, rows=12, loader=None):
        """Its data set, loaders and schedules; `loader` in place of the loaders."""
        questions = self.questions(rows)
        whole = {"is_s2s": False, "batch_size": 4}
        data = SimpleNamespace(target_ids=questions.target_ids, num_samples=N)
        for name, split in (("train_dataloader", "train"), ("test_dataloader", "validation")):
            setattr(data, name, loader or questions.loader(split=split, **whole))
        logger = SimpleNamespace(log=model.log.append)
        model.prepare_for_fit_evaluate(data, logger)
        return model

    def questions(self, rows=10, name="obqa", space=False):
        choices = {"text": ["p", "q", "r", "s"], "label": list("ABCD")}
        row = {"question_stem": "", "choices": choices, "answerKey": "B"}
        data = [{**row, "question_stem": str(i)} for i in range(rows)]
        splits = {"train": data, "validation": data[:], "test": data[:]}
        self.data.load_dataset = lambda *_, **__: splits
        return getattr(self.data, name)(transformers.AutoTokenizer.from_pretrained(self.hf), space)

    def steps(self, count, quiet=False):
        """The log of `count` steps; quiet: the logits are constant, so that no data act."""
        model = self.prepare(self.model(), loader=[(None, torch.tensor([0]), None)] * count)
        if quiet:
            model.forward_logits = lambda *_, **__: 0 * self.layers(model)[0].lora_A[
                "default"].log_s[None, None]  # fmt: skip
        else:
            tokens = {"input_ids": TOKENS}
            batch = SimpleNamespace(to=lambda _: tokens)
            model.train_loader = [(batch, torch.tensor([0, 1]), None)] * count
        total = sum(layer.div_posterior_prior().item() for layer in self.layers(model))
        model.fit(model.train_loader, None)
        names = {"nll": "train_nll_loss", "elbo": "elbo_loss", "pi": "pi", "rate": "lr"}
        return model, total, [{k: row[name] for k, name in names.items()} for row in model.log]

    def first_rates(self):
        model = self.prepare(self.model())
        return [group["lr"] / initial for group, initial in (
            (model.opt.param_groups[0], 1e-4), (model.opt2.param_groups[0], 0.2))]  # fmt: skip

    def periods(self, sizes):
        model, out = self.model(), []
        for size in sizes:
            data = SimpleNamespace(target_ids=torch.zeros(1, 1), num_samples=size,
                                   train_dataloader=[0], test_dataloader=[0])  # fmt: skip
            model.prepare_for_fit_evaluate(data)
            out.append(model.M)
        return out

    def evaluate(self, logits, labels):
        """Its evaluation of these logits (rows, classes), in batches of 4."""
        model = self.model()
        model.num_classes = logits.shape[1]
        model.forward_logits = lambda batch, **_: batch[0]
        batches = [(z[:, None], y, None) for z, y in zip(logits.split(4), labels.split(4))]  # noqa: B905
        _, ece, nll, _ = model.evaluate(batches)
        return float(nll), float(ece)


class Today(Release):
    """3843000, "Bayesian Adaptation Gym"."""

    commit = "3843000"

    def __init__(self, folder, hf):
        super().__init__(folder, hf)
        self.trainers = importlib.import_module("bayesadapt.trainers")
        self.wrappers = importlib.import_module("bayesadapt.lorawrappers")
        self.schedulers = importlib.import_module("bayesadapt.schedulers")
        self.ScalaBLLinear = self.wrappers.ScalaBLLinear

    def trainer(self, *options, wrapper="scalabl", **questions):
        """As its train_and_evaluate.py makes it, from its configuration."""
        hydra, omegaconf = (importlib.import_module(name) for name in ("hydra", "omegaconf"))
        config = importlib.import_module("hydra.core.hydra_config").HydraConfig
        with hydra.initialize_config_dir(str(self.folder / "conf"), version_base=None):
            composed = hydra.compose(
                "default",
                ["+lora=default", *([f"+lora/wrapper={wrapper}"] if wrapper != "mle" else []),
                 "optim=vi", "trainer=vi", "lora.config.r=3", "pbar=false",
                 f"hf_model={self.hf}", f"log_root={self.hf.parent / 'logs'}", *options],
                return_hydra_config=True,
            )  # fmt: skip
        config.instance().set_config(composed)
        values = omegaconf.OmegaConf.to_container(composed)
        del values["hydra"]
        for name in ("train_dataset", "test_dataset"):
            values[name] = {"_target_": f"{__name__}.Questions", **questions}
        return self.trainers.VITrainer(omegaconf.OmegaConf.create(values))

    def data(self, name):
        return importlib.import_module(f"bayesadapt.datasets.{name}")

    def model(self):
        return self.trainer().model

    def layers(self, model):
        return [m for m in model.modules() if isinstance(m, self.wrappers.VILoraWrapper)]

    def steps(self, count, quiet=False):
        trainer = self.trainer(rows=N)
        trainer.load_optimizer()
        layers = self.layers(trainer.model)
        batch = ({"input_ids": TOKENS}, torch.tensor([0, 1]), None)
        if quiet:
            batch = (None, torch.tensor([0]), None)
            trainer.compute_logits = lambda _: 0 * layers[0].lora_A["default"].log_s[None, None]
        total, log = sum(layer.kl_div.item() for layer in layers), []
        trainer.model.train()
        for _ in range(count):
            pi = trainer.kl_scheduler.last_pi
            step = trainer.train_step(batch)
            log.append({"nll": step["train/nll_loss"], "elbo": step["train/elbo"], "pi": pi,
                        "rate": step["train/nll_lr"]})  # fmt: skip
        return trainer.model, total, log

    def first_rates(self):
        trainer = self.trainer(rows=N)
        trainer.load_optimizer()
        return [trainer.nll_optimizer.param_groups[0]["lr"] / 1e-4,
                trainer.kl_optimizer.param_groups[0]["lr"] / 0.2]  # fmt: skip

    def periods(self, sizes):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.2)
        scheduler = self.schedulers.BLoBKLScheduler
        return [scheduler(optimizer, 0.06, STEPS, size, 4, 8.0).M for size in sizes]

    def evaluate(self, logits, labels):
        trainer = self.trainer(rows=4)
        trainer.class_ids = list(range(logits.shape[1]))
        trainer.testloader = [
            (z[:, None], y, [str(i)] * len(y))
            for i, (z, y) in enumerate(zip(logits.split(4), labels.split(4)))  # noqa: B905
        ]
        trainer.compute_logits = lambda z: z
        (result,), _ = trainer.evaluate(save=False, verbose=False)
        return result["NLL"], result["ECE"]


RELEASES = {release.commit: release for release in (First, Today)}


class Clock:
    """In place of torch.cuda.Event, which needs a GPU."""

    def __init__(self, **_):
        pass

    def record(self):
        pass

    def elapsed_time(self, _):
        return 0.0


def base_of(folder, tied=False):
    """A model folder of ours and the same one for transformers, with a tokenizer of bytes."""
    base, hf = tiny_folder(folder / "base", tie_word_embeddings=tied), folder / "base-hf"
    convert_hf.convert(base, hf, to_hf=True)
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(base / "tokenizer.json"), pad_token="!", unk_token="!", bos_token="!"
    ).save_pretrained(hf)
    return base, hf


@pytest.fixture(scope="module", params=RELEASES)
def release(request, tmp_path_factory):
    folder = os.environ.get("SCALABL_BAYESADAPT")
    if not folder or not (Path(folder) / request.param).is_dir():
        pytest.skip(f"SCALABL_BAYESADAPT names no folder with a checkout {request.param}")
    for name in NEEDS:
        pytest.importorskip(name)
    _, hf = base_of(tmp_path_factory.mktemp("official"))
    with pytest.MonkeyPatch.context() as patch, modules_of(Path(folder) / request.param):
        patch.setenv("WANDB_ENTITY", "nobody")
        patch.setattr(torch.cuda, "Event", Clock)
        for name in ("synchronize", "reset_peak_memory_stats"):
            patch.setattr(torch.cuda, name, lambda *_: None)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda *_: 0)
        yield RELEASES[request.param](Path(folder) / request.param, hf)


# --- the numbers of the table --------------------------------------------------------------------


def direction(release):
    """The KL of the layer at one point."""
    return [f"{release.kl(S, SIGMA):.4f}"]


def prior(release):
    """Mean and standard deviation of the prior, means over the scales of a layer."""
    torch.manual_seed(0)
    linear = release.linear(256, 8)
    return [f"{getattr(linear, name).exp().mean():.2f}" for name in ("log_p_mu", "log_p_sigma")]


def width(release):
    """Mean sigma after all steps of its training, with logits that do not depend on anything."""
    torch.manual_seed(0)
    model, _, _ = release.steps(STEPS, quiet=True)
    widths = [layer.lora_A["default"].log_s_sigma.exp() for layer in release.layers(model)]
    return [f"{torch.cat(widths).mean().item():.2f}"]


def shared_draw(release):
    """Largest difference between the outputs of two equal rows of a batch."""
    torch.manual_seed(0)
    linear, B = release.linear(), torch.nn.Linear(2, 3, bias=False)
    linear.blobsample = True
    y = linear(torch.ones(2, 16), B, 2.0)
    assert not torch.equal(y, linear(torch.ones(2, 16), B, 2.0))
    return [f"{(y[0] - y[1]).abs().max().item():.2f}"]


def mean_model(release):
    """Largest standard deviation of a logit over ten predictions of the mean model."""
    model = release.model().float().eval()
    with torch.no_grad():
        randomise(model)
        torch.manual_seed(0)
        if release.commit == "ef51e8a":
            release.prepare(model)
            batch = next(iter(model.test_loader))
            logits = [model.forward_logits(batch, sample=False) for _ in range(10)]
        else:
            for layer in release.layers(model):
                layer.sample(False)
            logits = [model(TOKENS).logits for _ in range(10)]
    return [f"{torch.stack(logits).std(0).max().item():.2f}"]


def logged(release):
    """(Logged ELBO - NLL) / KL in a first step; the KL of Qwen2.5-7B's layers at the start."""
    torch.manual_seed(0)
    _, total, (first,) = release.steps(1)
    ratio = (first["elbo"] - first["nll"]) / total
    sizes = [release.linear(d_in, 8).kl_div.item() for d_in in BLOCKS]
    return [f"{ratio:.2f}", f"{sum(sizes):,.0f}"]


def first_rate(release):
    """Factors on the rates of the NLL's and the KL's first step, of STEPS; the latter with pi."""
    return [f"{factor:.4f}" for factor in release.first_rates()]


def overflow(release):
    s, sigma = torch.tensor([1.0]), torch.tensor([-44.5]).exp()
    return [f"{release.kl(s, sigma):.1g}"]


def half_logits(release):
    """P(first) of the logits 8.03 and 8: 8 of the head, and 0.03 of its adapter."""
    model = release.model().eval()
    head = release.layers(model)[-1]
    A, B = head.lora_A["default"], head.lora_B["default"].weight
    with torch.no_grad():
        x = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
        x[..., 0] = 1
        head.base_layer.weight[:, 0] = 8
        A.Vh.copy_(torch.eye(3, 16))
        A.log_s.zero_()
        A.log_s_sigma.fill_(-20)
        B[0, 0] = 0.015  # the scaling is 2
        logits = head(x)[0, 0, :2]
    return [f"{logits.float().softmax(0)[0].item():.4f}"]


def scores(release):
    """NLL and ECE of `some_answers`."""
    return [f"{score:.4f}" for score in release.evaluate(*some_answers())]


def scale(release):
    """KL of (s, sigma) and of (s, sigma) / 2."""
    return [f"{release.kl(S / k, SIGMA / k):.4f}" for k in (1, 2)]


def test_set(release):
    """The split of OpenBookQA that is evaluated."""
    if release.commit == "3843000":
        return [release.trainer().testloader.dataset.split]
    release.questions()
    accelerator = importlib.import_module("accelerate").Accelerator(cpu=True)
    module = importlib.import_module("dataset.S2SDataset_Classification")
    data = module.S2SDataset_Classification(accelerator, release.args())
    data.get_loaders()
    splits = data.dset.dset
    return [name for name in splits if splits[name] is data.test_dataloader.dataset]


def last_batch(release):
    """Questions scored of 10, in batches of 4."""
    if release.commit == "ef51e8a":
        loader = release.questions().loader(is_s2s=False, batch_size=4, split="validation")
        return [str(sum(len(labels) for _, labels, _ in loader))]
    _, logits = release.trainer().evaluate(save=False, verbose=False)
    return [str(len(logits))]


def class_tokens(release):
    """Of the answers "true" and "false" of BoolQ, for a tokenizer of bytes."""
    if release.commit == "ef51e8a":
        last = release.questions(space=True).target_ids  # of " A" to " D", two tokens each
        assert last[:3].flatten().tolist() == LETTERS
        with pytest.raises(ValueError) as error:
            release.questions(name="boolq")
        return [str(error.value).split(",")[0]]
    ids = release.trainer(labels=release.data("boolq").BoolQ.labels).class_ids
    return [" and ".join(map(str, ids))]


def prompt(release):
    """The first choice, "p" with the letter A, in a prompt of OpenBookQA."""
    if release.commit == "ef51e8a":
        questions = release.questions()
        text = questions._format_prompts(questions.dset["train"][:1])[0]
    else:
        data = release.data("obqa")
        question = {"question_stem": "", "answerKey": "B", "id": "0",
                    "choices": {"text": ["p", "q"], "label": ["A", "B"]}}  # fmt: skip
        data.load_dataset = lambda *_: {"train": [question]}
        text = data.OBQA("train")[0]["prompt"]
    return [line for line in text.splitlines() if {*line} == {*"A) p"}]


def peft_adapters(release):
    """Largest logit of the saved adapter, loaded by PEFT, less that of the base model."""
    torch.manual_seed(0)
    folder, base = release.hf.parent / "saved", transformers.AutoModelForCausalLM
    plain = base.from_pretrained(release.hf).eval()
    if release.commit == "ef51e8a":
        model = release.model()
        with torch.no_grad():
            randomise(model)
            assert (model.float()(TOKENS).logits - plain(TOKENS).logits).abs().max() > 1
        model.save_pretrained(folder)
    else:
        trainer = release.trainer()
        assert trainer.model is not None
        trainer.save_model()
        folder = Path(trainer.expdir)
    try:
        loaded = peft.PeftModel.from_pretrained(base.from_pretrained(release.hf), folder).eval()
    except ValueError as error:
        return ["adapter_config.json"] if "adapter_config.json" in str(error) else [str(error)]
    with torch.no_grad():
        return [f"{(loaded(TOKENS).logits - plain(TOKENS).logits).abs().max().item():.2f}"]


POINTS = {
    "KL direction": direction,
    "prior": prior,
    "width": width,
    "shared draw": shared_draw,
    "mean model": mean_model,
    "logged loss": logged,
    "first step": first_rate,
    "overflow": overflow,
    "logits": half_logits,
    "scores": scores,
    "test set": test_set,
    "last batch": last_batch,
    "scale": scale,
    "prompt": prompt,
    "class tokens": class_tokens,
    "adapters": peft_adapters,
}


@pytest.mark.parametrize("point", POINTS)
def test_the_number_in_the_documents_is_this_one(release, point):
    got = POINTS[point](release)
    print(release.commit, point, got)
    assert numbers()[point][release.commit] == got


@pytest.mark.parametrize("commit", RELEASES)
def test_no_other_number_is_claimed(commit):
    assert {point for point, row in numbers().items() if row[commit]} == set(POINTS)


# --- what is the same ----------------------------------------------------------------------------


def test_initial_values(release):
    """As docs/method.md gives them: of the SVD of a matrix as nn.Linear draws it."""
    torch.manual_seed(0)
    matrix = torch.nn.Linear(64, 8, bias=False).weight.detach()
    torch.manual_seed(0)
    linear, eps = release.linear(64, 8), torch.finfo(torch.float32).eps
    assert torch.equal(linear.log_s.exp(), torch.linalg.svd(matrix)[1].log().exp())
    assert (linear.Vh @ linear.Vh.T - torch.eye(8)).abs().max() <= 64 * eps
    width = linear.log_s_sigma.exp()
    assert width.min() >= 0.05 / 2**0.5 - eps and width.max() <= 0.05 + eps
    assert all((layer.lora_B["default"].weight == 0).all() for layer in
               release.layers(release.model()))  # fmt: skip


def test_the_prior_is_made_of_the_initial_widths(release):
    """Its memory is that into which the widths are drawn."""
    linear = release.linear()
    width = linear.log_s_sigma.detach().exp()
    for name, value in (("log_p_mu", width), ("log_p_sigma", 1 + width)):
        error = (getattr(linear, name).exp() / value - 1).abs().max()
        assert error <= 1e-8 / 0.035 + 4 * torch.finfo(torch.float32).eps


def test_schedules(release):
    """The weights of the KL are ours; the rate of the NLL too, or one step ahead."""
    sizes = (160, 640, 1119, 2251, 2558, 4957, 9427, 10234)
    assert release.periods(sizes) == [kl_period(size, 4) for size in sizes]
    _, _, log = release.steps(700, quiet=True)  # two rounds of 316 and more
    ahead = {"ef51e8a": 0, "3843000": 1}[release.commit]
    for step, row in enumerate(log):
        assert row["pi"] == pytest.approx(kl_weight(step, 316), rel=1e-12)
        rate = 1e-4 * warmup_linear(step + 1 + ahead, STEPS, 0.06)  # of the next step
        assert row["rate"] == pytest.approx(rate, rel=1e-12)


def test_answers_of_confidence_one_count(release):
    """12 of them, 4 wrong."""
    labels = torch.arange(12) % 3 // 2
    _, ece = release.evaluate(torch.tensor([[200.0, 0.0]] * 12), labels)
    assert ece == pytest.approx(1 / 3, rel=4 * torch.finfo(torch.float32).eps)


def test_the_first_release_cannot_evaluate_its_mean_model(release):
    """--bayes-inference-notsample ends in an error."""
    if release.commit != "ef51e8a":
        pytest.skip("3843000 has no such option")
    model = release.prepare(release.model())
    model.args.bayes_inference_notsample = True
    with pytest.raises(IndexError):
        model.evaluate(model.test_loader)


# --- files of 3843000 ----------------------------------------------------------------------------


@pytest.fixture(params=[False, True], ids=["untied", "tied"])
def saved(request, release, tmp_path, monkeypatch):
    """made(method, whole): a trainer whose adapters are random and saved; and our base."""
    if release.commit == "ef51e8a":
        pytest.skip("it writes other files")
    base, hf = base_of(tmp_path, request.param)
    monkeypatch.setattr(release.trainers.VITrainer, "torch_dtype", torch.float32)

    def made(method, whole=False):
        trainer = Today(release.folder, hf).trainer(wrapper=method)
        if whole:
            trainer.class_ids = None  # as its code has it for a head that stays whole
        with torch.no_grad():
            randomise(trainer.model.eval())
        trainer.save_model()
        return trainer, Path(trainer.expdir)

    return base, made


@pytest.mark.parametrize("method", ["scalabl", "blob", "mle"])
@pytest.mark.parametrize("whole", [False, True], ids=["classes", "vocabulary"])
@torch.no_grad()
def test_a_saved_state_comes_in(release, saved, tmp_path, method, whole):
    """The mean's logits: their wrappers with sampling off."""
    base, made = saved
    trainer, folder = made(method, whole)
    for layer in release.layers(trainer.model):
        layer.sample(False)
    model = bring(base, folder, tmp_path / "run", "bayesadapt", {"sampling": "batch"})
    assert model.config.head_tokens == (None if whole else tuple(LETTERS))
    compare(f"official {method}", model, model(TOKENS), trainer.model(TOKENS).logits)


@torch.no_grad()
def test_a_draw_of_a_saved_state(release, saved, tmp_path, monkeypatch):
    """The widths come in too: the same noise in both, the same logits."""
    base, made = saved
    trainer, folder = made("scalabl")
    wrapped = trainer.model
    model = bring(base, folder, tmp_path / "run", "bayesadapt", {"sampling": "batch"})
    noise, order = Noise(5, 2), []
    for name, adapter in adapters(model).items():
        hf = name if name == "lm_head" else "model." + name.replace("attn", "self_attn")
        layer = wrapped.get_submodule(f"base_model.model.{hf}")
        layer.register_forward_pre_hook(lambda *_, a=adapter: order.append(a))

    def draw(like):
        return noise.normal(order[-1].layer, 1, len(like))[0]

    monkeypatch.setattr(torch, "randn_like", draw)
    logits = wrapped(TOKENS).logits
    monkeypatch.undo()
    assert len(order) == len(adapters(model)) == 5
    compare("draw of official scalabl", model, model(TOKENS, noise=noise), logits)
    assert (logits - model(TOKENS)).abs().max() > 100 * bound(model, logits)
