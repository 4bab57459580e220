"""What test_integrations.py runs by torchrun: one framework's loop, saved half-way, loaded, and compared."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from flashoptim_native import FlashAdamW

BF16 = torch.bfloat16


class Tokens(torch.utils.data.Dataset[Any]):
    """Sequences that count up, which a model learns within a few steps."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        self.ids = (torch.randint(0, 16, (64, 1), generator=generator) + torch.arange(16)) % 16

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


def tiny_llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config).to(BF16)


def flash(optimizer: Any) -> FlashAdamW:
    """The optimizer inside a framework's wrapper."""
    while not isinstance(optimizer, FlashAdamW):
        optimizer = getattr(optimizer, "optimizer", None) or optimizer._optimizer
    return optimizer


def same(a: nn.Module, ours: Any, b: nn.Module, theirs: Any) -> None:
    import layouts

    compared = layouts.compare(
        layouts.whole_of(a, flash(ours)), layouts.whole_of(b, flash(theirs)), "loaded against uninterrupted"
    )
    if dist.get_rank() == 0:
        print(f"{compared} arrays have the same bits")


# Accelerate


def take_fsdp_over_gloo() -> None:
    """Accelerate takes FSDP for GPUs alone, and forgets the plugin elsewhere; its ways work over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    its_own = AcceleratorState.__init__

    def init(self: Any, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        its_own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init


def accelerate(kind: str, path: str) -> None:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, GradientState, PartialState

    take_fsdp_over_gloo()

    def prepared() -> Any:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._shared_state.clear()
        model = tiny_llama()
        plugin = None
        if kind != "ddp":
            plugin = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
                state_dict_type="FULL_STATE_DICT" if kind == "full" else "SHARDED_STATE_DICT",
                cpu_ram_efficient_loading=False,
            )
        accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() <= 1]
        optimizer = FlashAdamW(
            [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "lr": 5e-4, "weight_decay": 0.0}], lr=1e-3
        )
        loader = torch.utils.data.DataLoader(Tokens(), batch_size=4)
        return accelerator, *accelerator.prepare(model, optimizer, loader)

    def train(parts: Any, first: int, last: int) -> None:
        accelerator, model, optimizer, loader = parts
        for number, batch in enumerate(loader):
            if first <= number < last:
                accelerator.backward(model(**batch).loss)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()

    whole = prepared()
    train(whole, 0, 3)
    whole[0].save_state(path + "/state")
    dist.barrier()
    train(whole, 3, 6)
    part = prepared()
    part[0].load_state(path + "/state")
    train(part, 3, 6)
    same(part[1], part[2], whole[1], whole[2])


# Lightning


def lightning(kind: str, path: str) -> None:
    import lightning as L
    from lightning.pytorch.plugins.environments import TorchElasticEnvironment
    from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
    from torch.distributed.fsdp import FSDPModule, fully_shard

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(65, 130), nn.ReLU(), nn.Linear(130, 7)).to(BF16)

        def configure_model(self) -> None:
            if kind != "ddp" and not isinstance(self.net, FSDPModule):
                mesh = self.device_mesh["data_parallel"]
                for module in (self.net[0], self.net[2], self.net):
                    fully_shard(module, mesh=mesh)

        def training_step(self, batch: Any, number: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self.net(x.to(BF16)).float(), y)

        def configure_optimizers(self) -> Any:
            return FlashAdamW(self.parameters(), lr=1e-3)

    def data() -> Any:
        generator = torch.Generator().manual_seed(1)
        x, y = torch.randn(64, 65, generator=generator), torch.randint(0, 7, (64,), generator=generator)
        return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)

    def trainer(epochs: int) -> Any:
        strategy: Any = DDPStrategy(process_group_backend="gloo")
        if kind != "ddp":
            strategy = ModelParallelStrategy(
                save_distributed_checkpoint=kind == "sharded", process_group_backend="gloo"
            )
        return L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            devices=2,
            strategy=strategy,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            default_root_dir=path,
            plugins=[TorchElasticEnvironment()],
        )

    whole, whole_trainer = Module(), trainer(4)
    whole_trainer.fit(whole, data())
    half, half_trainer = Module(), trainer(2)
    half_trainer.fit(half, data())
    half_trainer.save_checkpoint(path + "/half.ckpt")
    part, part_trainer = Module(), trainer(4)
    part_trainer.fit(part, data(), ckpt_path=path + "/half.ckpt")
    same(part, part_trainer.optimizers[0], whole, whole_trainer.optimizers[0])


# Hugging Face Trainer


def trainer(kind: str, path: str) -> None:
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from transformers import Trainer, TrainingArguments

    take_fsdp_over_gloo()
    fsdp: dict[str, Any] = {}
    if kind != "ddp":
        config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        config["state_dict_type"] = "FULL_STATE_DICT" if kind == "full" else "SHARDED_STATE_DICT"
        fsdp = {"fsdp": True, "fsdp_config": config}

    def made(folder: str) -> Any:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        PartialState._shared_state.clear()
        model = tiny_llama()
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=6,
            per_device_train_batch_size=4,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            ddp_backend="gloo",
            disable_tqdm=True,
            seed=1,
            **fsdp,
        )
        if kind == "ddp":
            optimizer = FlashAdamW(model.parameters(), lr=1e-3)
            return Trainer(model=model, args=arguments, train_dataset=Tokens(), optimizers=(optimizer, None))
        # Trainer takes no optimizer that is made for FSDP, but a class.
        make = (FlashAdamW, {"lr": 1e-3})
        return Trainer(model=model, args=arguments, train_dataset=Tokens(), optimizer_cls_and_kwargs=make)

    whole = made(path + "/a")
    whole.train()
    from torch.distributed.tensor import DTensor

    assert all(isinstance(p, DTensor) for p in whole.model.parameters()) == (kind != "ddp")
    dist.barrier()
    part = made(path + "/b")
    part.train(resume_from_checkpoint=path + "/a/checkpoint-3")
    same(part.model, part.optimizer, whole.model, whole.optimizer)


# A loop of one's own over a Hugging Face model with FSDP2, and NeMo's way to save: flat, on the host


def by_dcp(path: str, cpu_offload: bool) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as sd
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo")
    options = sd.StateDictOptions(flatten_optimizer_state_dict=cpu_offload, cpu_offload=cpu_offload)

    def made() -> Any:
        model = tiny_llama()
        for layer in model.model.layers:
            fully_shard(layer)
        fully_shard(model)
        return model, FlashAdamW(model.parameters(), lr=1e-3)

    def train(parts: Any, first: int, last: int) -> None:
        model, optimizer = parts
        for step in range(first, last):
            ids = Tokens().ids[8 * step + 4 * dist.get_rank() :][:4]
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.clip_grad_norm_(0.5)
            optimizer.step()
            optimizer.zero_grad()

    def held(parts: Any) -> dict[str, Any]:
        model, optimizer = parts
        return {
            "model": sd.get_model_state_dict(model),
            "optim": sd.get_optimizer_state_dict(model, optimizer, options=options),
        }

    whole = made()
    train(whole, 0, 3)
    dcp.save(held(whole), checkpoint_id=path + "/state")
    train(whole, 3, 6)
    part = made()
    loaded = held(part)
    dcp.load(loaded, checkpoint_id=path + "/state")
    sd.set_model_state_dict(part[0], loaded["model"])
    sd.set_optimizer_state_dict(*part, loaded["optim"], options=options)
    train(part, 3, 6)
    same(*part, *whole)


if __name__ == "__main__":
    case, path = sys.argv[1:]
    framework, _, kind = case.partition("-")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if framework == "accelerate":
        accelerate(kind, path)
    elif framework == "lightning":
        lightning(kind, path)
    elif framework == "trainer":
        trainer(kind, path)
    else:
        by_dcp(path, cpu_offload=framework == "nemo")
