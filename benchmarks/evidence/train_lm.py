"""One training run of a language model that can be stopped and resumed.

A run writes results/NAME.json: its configuration, validation losses, the loss of every step, tokens a second, memory,
bytes held and every resume. When it is told to stop it saves everything, and the next call goes on from there. Weights
and states must then be those that were saved, byte for byte, and the validation loss must be the same number.
"""

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from lm import LanguageModel, Shape, Windows
from variants import clip_gradients, fingerprint, held_bytes, make_optimizer

MAX_NORM = 1.0
REPORT_EVERY = 20  # steps
SAVE_EVERY = 1000  # steps


@dataclasses.dataclass(frozen=True)
class Run:
    name: str
    variant: str
    seed: int
    text: str  # trained on: "code" or "prose"
    steps: int
    batch: int  # windows
    lr: float
    lr_at_end: float  # share of lr
    warm_up: int  # steps
    evaluate_every: int  # steps
    evaluate_windows: int  # of each evaluation but the last, which takes all
    start: str | None = None  # the run whose final weights it starts from
    shape: Shape = dataclasses.field(default_factory=Shape)

    def lr_of(self, step: int) -> float:
        """Linear warm-up, then half a cosine."""
        if step < self.warm_up:
            return self.lr * (step + 1) / self.warm_up
        progress = (step - self.warm_up) / max(1, self.steps - self.warm_up)
        return self.lr * (self.lr_at_end + (1 - self.lr_at_end) * 0.5 * (1 + math.cos(math.pi * progress)))


class Texts:
    """Windows of the token files of a folder, loaded once a process."""

    def __init__(self, folder: Path, context: int, device: torch.device) -> None:
        self._arguments = folder, context, device
        self._loaded: dict[str, Windows] = {}

    def __getitem__(self, name: str) -> Windows:
        folder, context, device = self._arguments
        if name not in self._loaded:
            self._loaded[name] = Windows(folder / f"{name}.bin", context, device)
        return self._loaded[name]


class Training:
    def __init__(self, run: Run, texts: Texts, folder: Path, device: torch.device) -> None:
        self.run, self.texts, self.folder, self.device = run, texts, folder, device
        self.checkpoint = folder / f"{run.name}.pt"
        self.model = LanguageModel(run.shape, run.seed).to(device)
        if run.start is not None:
            saved = torch.load(folder / f"{run.start}.pt", map_location=device, weights_only=True, mmap=True)
            self.model.load_state_dict(saved["model"])
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self.optimizer = make_optimizer(run.variant, self.model, run.lr)
        self.step = 0
        self.record: dict = {
            "run": dataclasses.asdict(run),
            "train_loss": [],
            "evaluations": [],
            "resumes": [],
            "speeds": [],
            "seconds": 0.0,
        }
        if self.checkpoint.exists():
            self._resume()

    @property
    def finished(self) -> bool:
        return "final" in self.record

    def _evaluate(self, name: str, most: int) -> float:
        """Mean loss; with gradients switched on, as in training, so that nothing is compiled anew."""
        losses = [self.model(windows).detach() for windows in self.texts[name].first(most, self.run.batch)]
        return torch.stack(losses).double().mean().item()

    def evaluate(self, most: int) -> dict:
        found = {"step": self.step, self.run.text: self._evaluate(f"{self.run.text}_held", most)}
        if self.run.start is not None:  # what it is trained to forget
            found["code"] = self._evaluate("code_held", most)
        return found

    def save(self) -> None:
        """Everything that the run needs to go on, whole or not at all."""
        probe = None if self.finished else self._evaluate(f"{self.run.text}_held", self.run.evaluate_windows)
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "probe": probe,
            "fingerprint": fingerprint(self.optimizer, self.model),
            "record": json.dumps(self.record),
        }
        partial = self.checkpoint.with_suffix(".partial")
        torch.save(content, partial)
        partial.replace(self.checkpoint)
        self.write_record()

    def write_record(self) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated()
            self.record["peak_memory_bytes"] = max(peak, self.record.get("peak_memory_bytes", 0))
        results = self.folder / "results"
        results.mkdir(exist_ok=True)
        (results / f"{self.run.name}.json").write_text(json.dumps(self.record) + "\n")

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        record = json.loads(saved["record"])
        if record["run"] != self.record["run"]:
            raise RuntimeError(f"{self.checkpoint} is of another run: {record['run']}")
        self.record, self.step = record, saved["step"]
        if self.finished:
            return
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        probe = self._evaluate(f"{self.run.text}_held", self.run.evaluate_windows)
        same = fingerprint(self.optimizer, self.model) == saved["fingerprint"]
        resume = {"step": self.step, "loss_saved": saved["probe"], "loss_resumed": probe, "same_bytes": same}
        if not same or probe != saved["probe"]:
            raise RuntimeError(f"{self.run.name} resumed with other weights or states than were saved: {resume}")
        self.record["resumes"].append(resume)

    def _set_lr(self) -> None:
        lr = self.run.lr_of(self.step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr

    def train(self, wants_stop: Callable[[int], bool], say: Callable[[str], None]) -> bool:
        """Trains until the run is finished (True) or `wants_stop(step)` (False: saved, the next call goes on)."""
        run, pending, warm = self.run, [], False
        started = mark = time.perf_counter()
        before = self.record["seconds"]
        if self.step == 0 and not self.record["evaluations"]:
            self.record["evaluations"].append(self.evaluate(run.evaluate_windows))
        while self.step < run.steps:
            if wants_stop(self.step):
                self._flush(pending)
                self.record["seconds"] = before + time.perf_counter() - started
                self.save()
                return False
            self._set_lr()
            loss = self.model(self.texts[f"{run.text}_train"].training(self.step, run.batch, run.seed))
            loss.backward()
            clip_gradients(self.optimizer, self.model, MAX_NORM)
            if self.step == 1 or self.step + 1 == run.steps:
                self.record["bytes"] = held_bytes(self.optimizer, self.model)  # with gradients alive
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            pending.append(loss.detach())
            self.step += 1
            if self.step % REPORT_EVERY == 0:
                self._flush(pending)
                now = time.perf_counter()
                if warm:
                    self.record["speeds"].append(round(REPORT_EVERY * run.batch * run.shape.context / (now - mark)))
                warm, mark = True, now
            if self.step % run.evaluate_every == 0 and self.step < run.steps:
                self.record["evaluations"].append(self.evaluate(run.evaluate_windows))
                say(f"{run.name} step {self.step}: {self.record['evaluations'][-1]}, {self.speed()} tokens/s")
                warm = False
            if self.step % SAVE_EVERY == 0 and self.step < run.steps:
                self.save()
                warm = False
            if not warm and self.step % REPORT_EVERY == 0:
                warm, mark = True, time.perf_counter()
        self._flush(pending)
        self.record["seconds"] = before + time.perf_counter() - started
        self._finish()
        say(f"{run.name} finished: {self.record['final']}, {self.speed()} tokens/s")
        return True

    def _flush(self, pending: list[torch.Tensor]) -> None:
        if pending:
            losses = torch.stack(pending).tolist()
            if not all(map(math.isfinite, losses)):
                raise RuntimeError(f"{self.run.name}: a loss before step {self.step} is not finite: {losses}")
            self.record["train_loss"] += [round(loss, 5) for loss in losses]
            pending.clear()

    def speed(self) -> int | None:
        return round(statistics.median(self.record["speeds"])) if self.record["speeds"] else None

    def _finish(self) -> None:
        self.record["evaluations"].append(self.evaluate(10**9))
        self.record["final"] = self.record["evaluations"][-1]
        self.record["tokens_a_second"] = self.speed()
        if self.device.type == "cuda":
            self.record["device"] = torch.cuda.get_device_name()
        self.record["torch"] = torch.__version__
        self.save()
        self.record["checkpoint_bytes"] = self.checkpoint.stat().st_size
        self.write_record()
        if self.run.start is not None:
            self.checkpoint.unlink()
