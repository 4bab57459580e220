"""What blocks of docs/recipes.md take for granted (``before``), and what must hold when they have run (``after``)."""

from __future__ import annotations

#: A model of Hugging Face's kind, from its configuration, and sequences that count up.
_LLAMA = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
torch.set_num_threads(1)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64))
ids = (torch.randint(0, 16, (96, 1)) + torch.arange(16)) % 16
dataset = [{"input_ids": one, "labels": one} for one in ids]
loader = torch.utils.data.DataLoader(dataset, batch_size=4)
"""

_TRAINED = """
from flashoptim_native import FlashAdamW

def flash(one):
    while not isinstance(one, FlashAdamW):
        one = getattr(one, "optimizer", None) or one._optimizer
    return one

def check(model, optimizer):
    moved = 0
    for name, param in model.named_parameters():
        if not param.requires_grad:
            assert param not in flash(optimizer).state, name
            continue
        assert param.dtype == torch.bfloat16, (name, param.dtype)
        state = flash(optimizer).state[param]
        assert state["correction"].dtype == torch.int8, name
        moved += int(state["step"]) >= 10
    assert moved > 0
"""

_TOKENIZER = """
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

words = {word: number for number, word in enumerate(["<pad>", "<eos>", *map(str, range(100))])}
made = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
made.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>", unk_token="<pad>")
dataset = Dataset.from_list([{"text": " ".join(map(str, range(first, first + 12)))} for first in range(80)])
"""

#: timm's models import torchvision, whose wheel may be for another build of torch; what they need of it is a name.
_TORCHVISION = """
import importlib.abc, importlib.machinery, sys, types

MODES = ("NEAREST", "BILINEAR", "BICUBIC", "BOX", "HAMMING", "LANCZOS")

def anything(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return type(name, (), {mode: number for number, mode in enumerate(MODES)})

class Stub(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        is_it = name.partition(".")[0] == "torchvision"
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if is_it else None

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__getattr__ = anything
        module.__version__ = "0.28.0"
        return module

    def exec_module(self, module):
        pass

try:
    import torchvision
except (ImportError, RuntimeError):
    for one in [one for one in sys.modules if one.partition(".")[0] == "torchvision"]:
        del sys.modules[one]
    sys.meta_path.insert(0, Stub())
"""

#: Before, after. These are run by test-all in an environment of their own.
FRAMEWORKS: dict[str, tuple[str, str]] = {
    "trainer": (_LLAMA, _TRAINED + "check(trainer.model, trainer.optimizer)"),
    "trl": (_LLAMA + _TOKENIZER, _TRAINED + "check(trainer.model, trainer.optimizer)"),
    "peft": (
        _LLAMA,
        _TRAINED + "check(model, optimizer)\nassert sum(p.requires_grad for p in model.parameters()) == 8\n"
        "assert all(p.dtype == torch.bfloat16 for p in model.parameters())",
    ),
    "accelerate": (_LLAMA, _TRAINED + "check(model, optimizer)\nimport os\nassert os.listdir('state')"),
    "lightning": (_LLAMA, _TRAINED + "check(model, trainer.optimizers[0])"),
    "timm": (
        _TORCHVISION + "import torch\ntorch.set_num_threads(1)\ntorch.manual_seed(0)\n"
        "loader = [(torch.randn(2, 3, 224, 224), torch.randint(0, 10, (2,))) for _ in range(5)]\n",
        _TRAINED + "check(model, optimizer)\nassert {g['weight_decay'] for g in optimizer.param_groups} == {0.05, 0.0}",
    ),
}

_MODEL = """
import sys
import types
import torch
from torch import nn

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(torch.bfloat16)

def losses(optimizer, steps=30):
    result = []
    for _ in range(steps):
        x = torch.randn(32, 64, dtype=torch.bfloat16)
        loss = nn.functional.mse_loss(model(x), x.flip(1))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result
"""

#: As torchtitan's, in what it does with the class and its arguments.
_TITAN = """
class OptimizersContainer:
    def __init__(self, model_parts, optimizer_cls, optimizer_kwargs):
        self.optimizers = [
            optimizer_cls([p for p in part.parameters() if p.requires_grad], **optimizer_kwargs) for part in model_parts
        ]

    def step(self):
        for one in self.optimizers:
            one.step()

    def zero_grad(self):
        for one in self.optimizers:
            one.zero_grad()

model_parts = [model[0], model[2]]
"""

#: ms-swift's modules, as far as a plugin sees them.
_SWIFT = """
base, mapping = types.ModuleType("swift.optimizers.base"), types.ModuleType("swift.optimizers.mapping")

class OptimizerCallback:
    def __init__(self, args, trainer):
        self.args, self.trainer = args, trainer

base.OptimizerCallback, mapping.optimizers_map = OptimizerCallback, {}
modules = {"swift": types.ModuleType("swift"), "swift.optimizers": types.ModuleType("swift.optimizers")}
sys.modules.update(modules | {"swift.optimizers.base": base, "swift.optimizers.mapping": mapping})
"""

#: Torch alone: run by make test.
PLAIN: dict[str, tuple[str, str]] = {
    "torchtitan": (_MODEL + _TITAN, "found = losses(optimizers)\nassert found[-1] < 0.95 * found[0]"),
    "alias": (
        "",
        "assert FlashAdamW is flashoptim_native.FlashAdamW",
    ),
    "swift": (
        _MODEL + _SWIFT,
        "args = types.SimpleNamespace(optim_args='state_codec=default,betas=(0.9, 0.95)', learning_rate=1e-3, "
        "weight_decay=0.1)\n"
        "optimizer = optimizers_map['flash'](args, types.SimpleNamespace(model=model)).create_optimizer()\n"
        "assert optimizer.param_groups[0]['betas'] == (0.9, 0.95)\n"
        "found = losses(optimizer)\nassert found[-1] < 0.95 * found[0]",
    ),
    "onetrainer": (
        _MODEL,
        "plain = losses(types.SimpleNamespace(step=lambda: None, zero_grad=lambda: None))\n"
        "assert plain[-1] < 0.95 * plain[0] and all(p.grad is None for p in model.parameters())\n"
        "assert all(int(optimizer.state[p]['step']) == 30 for p in model.parameters())",
    ),
}

#: nanoGPT's method and training loop, as far as the lines that change go.
NANOGPT_METHOD = """
import torch
from torch import nn

class GPT(nn.Sequential):
    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        param_dict = {pn: p for pn, p in self.named_parameters() if p.requires_grad}
        decay_params = [p for n, p in param_dict.items() if p.dim() >= 2]
        nodecay_params = [p for n, p in param_dict.items() if p.dim() < 2]
        optim_groups = [
            {'params': decay_params, 'weight_decay': weight_decay},
            {'params': nodecay_params, 'weight_decay': 0.0}
        ]
"""
NANOGPT_LOOP = """
from contextlib import nullcontext

torch.manual_seed(0)
device_type, grad_clip, dtype = 'cpu', 1.0, 'bfloat16'
model = GPT(nn.Embedding(64, 64), nn.Linear(64, 64))
optimizer = model.configure_optimizers(0.1, 1e-2, (0.9, 0.95), device_type)
scaler = torch.amp.GradScaler(device_type, enabled=(dtype == 'float16'))
ctx = nullcontext() if device_type == 'cpu' else torch.amp.autocast(device_type=device_type, dtype=ptdtype)
found = []
for iter_num in range(30):
    X = torch.randint(0, 64, (64,))
    with ctx:
        loss = nn.functional.cross_entropy(model(X), (X + 1) % 64)
    scaler.scale(loss).backward()
    if grad_clip != 0.0:
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    found.append(loss.item())
assert found[-1] < 0.8 * found[0], found
assert all(p.dtype == torch.bfloat16 for p in model.parameters())
"""
