"""A tour of the library, a minute on one CPU core: prints what each feature does, and draws it all as one picture.

    python examples/python/tour.py                  prints, and writes tour.png (with matplotlib)
    python examples/python/tour.py --quick          the same with fewer steps, for the impatient
    python examples/python/tour.py --out FOLDER     where picture and checkpoints go (default: tour_out)

A small GPT reads English text, once with torch's fp32 AdamW and once with FlashAdamW. What is printed is measured here.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import flashoptim_native
from flashoptim_native import FlashAdamW, cast_model, checkpoint_contents, convert, enable_gradient_release

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train_gpt"))
from topics_text import joined_topics

BF16 = torch.bfloat16
WIDTH, LAYERS, HEADS, LENGTH, BATCH, LR = 96, 3, 4, 64, 16, 2e-3
INK, BLUE, SKY, ORANGE, RED, GREEN = "#222222", "#3b5b92", "#9db7e0", "#f2a65a", "#c44e52", "#4f9d69"


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.before_attention, self.before_mlp = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x):
        parts = self.qkv(self.before_attention(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.mlp(self.before_mlp(x))


class GPT(nn.Module):
    def __init__(self, vocabulary):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, vocabulary, bias=False)

    def forward(self, ids):
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        return self.head(self.norm(self.blocks(x)))


class Text:
    """English text as numbers of its characters; a step's batch depends on the step alone."""

    def __init__(self):
        characters = joined_topics()[:200_000]
        alphabet = sorted(set(characters))
        self.vocabulary = len(alphabet)
        self.ids = torch.tensor([alphabet.index(one) for one in characters])

    def loss(self, model, step):
        generator = torch.Generator().manual_seed(step)
        starts = torch.randint(0, len(self.ids) - LENGTH - 1, (BATCH,), generator=generator).tolist()
        ids = torch.stack([self.ids[start : start + LENGTH + 1] for start in starts])
        return cross_entropy(model(ids[:, :-1]).float().flatten(0, 1), ids[:, 1:].flatten())

    def model(self):
        torch.manual_seed(0)
        return GPT(self.vocabulary)


def train(text, model, optimizer, first, last):
    losses = []
    for step in range(first, last):
        loss = text.loss(model, step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def flash(text, **options):
    """A bf16 model, and its optimizer: made first, so that corrections keep what the cast cuts off."""
    model = text.model()
    optimizer = FlashAdamW(model.named_parameters(), lr=LR, **options)
    cast_model(model, BF16, optimizer=optimizer)
    return model, optimizer


def say(number, title, *lines):
    print(f"\n{number}. {title}")
    for line in lines:
        print(f"   {line}")


def held(model, optimizer):
    """Bytes a parameter, by part, counted from the tensors themselves."""
    params = list(model.parameters())
    states = {"corrections": 0, "states": 0}
    for param in params:
        for key, value in optimizer.state[param].items():
            if isinstance(value, torch.Tensor):
                states["corrections" if key == "correction" else "states"] += value.nbytes
    parts = {"weights": sum(p.nbytes for p in params)}
    parts["gradients"] = sum(p.grad.nbytes for p in params if p.grad is not None)
    count = sum(p.numel() for p in params)
    return {part: size / count for part, size in (parts | states).items()}


# The stops


def memory(text, steps):
    """torch's fp32 AdamW and FlashAdamW on the same batches."""
    plain = text.model()
    adamw = torch.optim.AdamW(plain.parameters(), lr=LR, weight_decay=0.01)
    theirs = train(text, plain, adamw, 0, steps)
    model, optimizer = flash(text)
    ours = train(text, model, optimizer, 0, steps)
    before, after = held(plain, adamw), held(model, optimizer)
    count = sum(p.numel() for p in plain.parameters())
    say(
        1,
        f"Memory: a GPT of {count:,} parameters, {steps} steps",
        f"torch.optim.AdamW, fp32: {sum(before.values()):6.3f} bytes a parameter, loss {average(theirs):.3f}",
        f"FlashAdamW, bf16:        {sum(after.values()):6.3f} bytes a parameter, loss {average(ours):.3f}",
    )
    return before, after, theirs, ours


def average(losses):
    last = losses[-20:]
    return sum(last) / len(last)


def corrections(steps):
    """A weight of 1 that is to fall by 1e-5 a step: bf16 has no number between 1 and 0.996."""
    ways = {
        "fp32": (torch.float32, {}),
        "bf16, 8-bit correction": (BF16, {}),
        "bf16 alone": (BF16, {"master_weight_bits": None}),
    }
    paths = {}
    for name, (dtype, options) in ways.items():
        weight = nn.Parameter(torch.ones(4096, dtype=dtype))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the constructor warns of what the third shows
            optimizer = FlashAdamW([weight], lr=1e-5, weight_decay=0.0, **options)
        path = []
        for _ in range(steps):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
            correction = optimizer.state[weight].get("correction")
            exact = weight if correction is None else flashoptim_native.reconstruct_fp32_param(weight, correction)
            path.append(exact.detach().float().mean().item())
        paths[name] = path
    lines = [f"{name + ':':<24} 1 -> {path[-1]:.5f}" for name, path in paths.items()]
    say(2, f"Corrections: {steps} steps of 1e-5 from a weight of 1", *lines)
    return paths


def release(text):
    """Bytes of gradients that are alive, each time that one is complete, while backward() goes through the model."""

    def watched(releases):
        model, optimizer = flash(text)
        alive = []

        def note(*_):
            alive.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

        if releases:
            enable_gradient_release(model, optimizer, pre_step=note)
        else:
            for param in model.parameters():
                param.register_post_accumulate_grad_hook(note)
        text.loss(model, 0).backward()
        optimizer.step()
        return alive, [param.detach().clone() for param in model.parameters()]

    (kept, one), (freed, other) = watched(False), watched(True)
    same = all(torch.equal(a, b) for a, b in zip(one, other))
    say(
        3,
        "Gradient release: every parameter is stepped during backward(), and its gradient is freed",
        f"most bytes of gradients at once: {max(kept):,} without, {max(freed):,} with; the same bits: {same}",
    )
    assert same
    return kept, freed


def telemetry():
    """Counts of what a format loses, and the options that mend it: inputs, and so gradients, over five decades."""
    scales = torch.logspace(0, -5, 64)

    def trained(**options):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(BF16)
        optimizer = FlashAdamW(model.named_parameters(), master_weight_bits=32, check_numerics=True, **options)
        for _ in range(5):
            x = torch.randn(64, 64)
            loss = (model((x * scales).to(BF16)).float() - x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return optimizer, optimizer.numerics_report().floored_codes

    optimizer, lost = trained(state_codec="paper")
    suggested = flashoptim_native.suggest_policy(optimizer)
    _, mended = trained(state_codec="paper", policy=suggested)
    say(
        4,
        "Telemetry: gradients over five decades, in the state format of the paper (check_numerics=True)",
        f"states that became 0: {lost:,}; with the policy that suggest_policy() names: {mended:,}",
        *str(suggested).splitlines(),
    )
    assert mended < lost


def policy(text):
    """Options by names of parameters."""
    options = {"tokens*": {"quantize": False}, "blocks.*": {"master_weight_bits": 32}}
    _, optimizer = flash(text, policy=options)
    say(5, f"Policy: options by name, {options}", *str(optimizer.describe()).splitlines())


def checkpoint(text, steps, folder, uninterrupted):
    """Stops half-way, saves, looks into the file, converts it, and resumes to the bits of the uninterrupted run."""
    half = steps // 2
    model, optimizer = flash(text)
    losses = train(text, model, optimizer, 0, half)
    path = folder / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    del model, optimizer

    contents = checkpoint_contents.read(path)
    expected = convert.expected(path, "torch", key="optimizer")
    target = folder / "for_torch.pt"
    target.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.optim keeps no corrections: get_fp32_model_state_dict() has them
        convert.file(path, target, "torch", key="optimizer")
    theirs = text.model()
    adamw = torch.optim.AdamW(theirs.parameters(), lr=LR)
    adamw.load_state_dict(torch.load(target, weights_only=True)["optimizer"])

    model, optimizer = flash(text)
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    losses += train(text, model, optimizer, half, steps)
    same = losses == uninterrupted
    say(
        6,
        "A checkpoint: inspected, converted, resumed",
        f"{path}: {contents.writer} {contents.optimizer}, {contents.elements:,} elements, "
        f"{contents.bytes / contents.elements:.3f} bytes each, {len(contents.suspicious)} suspicious tensors",
        f"for torch.optim.AdamW: {expected.source_bytes:,} -> {expected.target_bytes:,} bytes, loaded there",
        f"resumed at step {half}: the losses of the uninterrupted run to the last bit: {same}",
        "as commands: flashoptim-native inspect checkpoint.pt; flashoptim-native convert checkpoint.pt for_torch.pt "
        "--to torch --key optimizer",
    )
    assert same
    return contents, losses, half


# The picture


def picture(path, bars, losses, paths, gradients, contents, resumed):
    try:
        import matplotlib
    except ImportError:
        print("\nno picture: pip install matplotlib draws one")
        return
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.titlesize": 10.5, "axes.titleweight": "bold", "axes.titlelocation": "left"}
    )
    figure, axes = plt.subplots(2, 3, figsize=(14, 7.2), layout="constrained")
    for one in axes.flat:
        one.spines[["top", "right"]].set_visible(False)
    draw_memory(axes[0, 0], *bars)
    draw_losses(axes[0, 1], *losses)
    draw_corrections(axes[0, 2], paths)
    draw_release(axes[1, 0], *gradients)
    draw_codes(axes[1, 1], contents)
    draw_resume(axes[1, 2], *resumed)
    figure.suptitle("flashoptim in six pictures", fontsize=14, fontweight="bold", x=0.01, ha="left")
    figure.savefig(path, dpi=110)
    print(f"\npicture: {path}")


def draw_memory(axes, before, after):
    rows = {
        "torch AdamW\nfp32": before,
        "FlashAdamW\nbf16": after,
        "with gradient\nrelease": after | {"gradients": 0.0},
    }
    colours = {"weights": BLUE, "gradients": SKY, "corrections": ORANGE, "states": RED}
    for row, parts in enumerate(rows.values()):
        left = 0.0
        for part, colour in colours.items():
            axes.barh(row, parts[part], left=left, color=colour, height=0.6, label=part if row == 0 else None)
            left += parts[part]
        axes.text(left + 0.3, row, f"{left:.2f}", va="center", fontweight="bold")
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xlim(0, 19)
    axes.legend(frameon=False, loc="lower right")
    axes.set(title="Memory: bytes a parameter", xlabel="counted from the tensors")


def draw_losses(axes, theirs, ours):
    axes.plot(smooth(theirs), color=INK, linewidth=2.4, label="torch AdamW, fp32")
    axes.plot(smooth(ours), color=RED, linewidth=1.4, linestyle="--", label="FlashAdamW, bf16")
    axes.legend(frameon=False)
    axes.set(title="The same curve", xlabel="step", ylabel="training loss")


def smooth(losses, weight=0.9):
    result, at = [], losses[0]
    for loss in losses:
        at = weight * at + (1 - weight) * loss
        result.append(at)
    return result


def draw_corrections(axes, paths):
    for (name, path), colour, width, style in zip(paths.items(), (INK, RED, SKY), (2.6, 1.4, 2.0), ("-", "--", "-")):
        axes.plot(path, color=colour, linewidth=width, linestyle=style, label=name)
    axes.legend(frameon=False, loc="lower left")
    axes.set(title="Corrections: updates of 1e-5 to a weight of 1", xlabel="step")
    axes.ticklabel_format(useOffset=False)


def draw_release(axes, kept, freed):
    for values, colour, label in ((kept, SKY, "without"), (freed, RED, "with gradient release")):
        axes.fill_between(
            range(len(values)), [v / 1e3 for v in values], color=colour, step="post", alpha=0.85, label=label
        )
    axes.legend(frameon=False, loc="upper left")
    axes.set(title="Gradients alive during backward()", xlabel="gradients complete, last layer to first", ylabel="kB")


def draw_codes(axes, contents):
    largest = max((one for one in contents.tensors if one.kind == "codes"), key=lambda one: one.bytes).parameter
    for one, colour in zip(
        (t for t in contents.tensors if t.parameter == largest and t.histogram), (BLUE, GREEN, ORANGE)
    ):
        share = [100 * count / sum(one.histogram) for count in one.histogram]
        edges = [8 * edge for edge in range(len(share) + 1)]
        axes.stairs(share, edges, color=colour, fill=True, alpha=0.15)
        axes.stairs(share, edges, color=colour, linewidth=1.8, label=one.name)
    axes.legend(frameon=False)
    axes.set_ylim(0)
    axes.set(title=f"Inspected: the bytes of {largest}", xlabel="byte, smallest to largest", ylabel="% of elements")


def draw_resume(axes, uninterrupted, resumed, half):
    axes.plot(smooth(uninterrupted), color=INK, linewidth=2.6, label="uninterrupted")
    axes.plot(smooth(resumed), color=GREEN, linewidth=1.3, linestyle="--", label="stopped and resumed: the same bits")
    axes.axvline(half, color=RED, linewidth=1, linestyle=":")
    axes.annotate("saved, inspected,\nconverted, loaded", (half, max(smooth(resumed))), xytext=(6, -14),
                  textcoords="offset points", color=RED)  # fmt: skip
    axes.legend(frameon=False, loc="center right")
    axes.set(title="Resumed", xlabel="step", ylabel="training loss")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("tour_out"), help="where picture and checkpoints go")
    parser.add_argument("--quick", action="store_true", help="fewer steps")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    steps, small = (40, 60) if args.quick else (400, 400)
    torch.set_num_threads(1)  # the model is small: threads would wait for each other
    begin = time.perf_counter()
    text = Text()
    before, after, theirs, ours = memory(text, steps)
    paths = corrections(small)
    gradients = release(text)
    telemetry()
    policy(text)
    contents, resumed, half = checkpoint(text, steps, args.out, ours)
    picture(args.out / "tour.png", (before, after), (theirs, ours), paths, gradients, contents, (ours, resumed, half))
    print(f"{time.perf_counter() - begin:.0f} s")


if __name__ == "__main__":
    main()
