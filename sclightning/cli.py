"""The ``sclightning`` command: LightningCLI with our modules, our data, and errors of one sentence."""

import argparse
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from pathlib import Path

import lightning as L
import torch
import yaml
from jsonargparse import ArgumentParser, Namespace, auto_cli
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import sclightning.backbones
import sclightning.callbacks
import sclightning.data
import sclightning.modules  # noqa: F401 - imported so that their classes can be named in YAML
from sclightning.callbacks import FIDEvaluation, SampleWriter
from sclightning.checkpoint import read_checkpoint
from sclightning.modules.base import TrigFlowModule

# Commands that need no Trainer: name of the command -> module and function, whose docstring is the command's help.
COMMANDS: dict[str, tuple[str, str]] = {
    "prepare": ("sclightning.data.prepare", "prepare"),
    "ema": ("sclightning.callbacks.posthoc_ema", "reconstruct"),
    "export": ("sclightning.export", "export"),
}


class SaveFitConfig(SaveConfigCallback):
    """Writes ``config.yaml`` for ``fit`` only: a test of a run must not overwrite how it was trained."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Write at the start of training."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class SCLightningCLI(LightningCLI):
    """``fit``, ``validate``, ``test`` and ``predict`` over the modules and data modules of this package or yours."""

    def __init__(self, args: ArgsType = None, run: bool = True):
        super().__init__(
            model_class=TrigFlowModule,
            datamodule_class=L.LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_callback=SaveFitConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            # Lightning's own support would make each optimizer factory hold this object and the Trainer.
            load_from_checkpoint_support=False,
            parser_kwargs={
                "exit_on_error": False,
                "epilog": f"Without a Trainer: sclightning {{{','.join(COMMANDS)}}}, each with a --help of its own.",
            },
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The folder that ``predict`` writes to, and what ``test`` measures."""
        parser.add_lightning_class_args(SampleWriter, "samples")
        parser.add_subclass_arguments(FIDEvaluation, "evaluation")

    def before_instantiate_classes(self) -> None:
        """Look whether the devices are there.

        Raises:
            ValueError: If several are asked for where there is no GPU, which Lightning takes to be processes.
        """
        trainer = self._get(self.config, "trainer")
        several = str(trainer.devices) not in ("auto", "-1", "0", "1")  # the command line gives strings
        if several and trainer.accelerator == "auto" and not torch.accelerator.is_available():
            raise ValueError(
                f"trainer.devices is {trainer.devices} and there is no GPU here; give --trainer.devices=1, or "
                "--trainer.accelerator=cpu and the number of processes on the CPU."
            )

    def instantiate_classes(self) -> None:
        """Everything but the evaluation: its extractors read their weights as they are made, for ``test`` alone."""
        config = self.config[self.subcommand] if self.subcommand else self.config
        self._evaluation = config.pop("evaluation", None)
        super().instantiate_classes()
        config["evaluation"] = self._evaluation

    def before_fit(self) -> None:
        """Say so if the end of the run will not be in its last checkpoint: Lightning saves at multiples only.

        Raises:
            ValueError: If the schedule of the learning rate ends before the run.
        """
        end = self.config[self.subcommand].get("model.init_args.lr_scheduler.init_args.total_steps")
        if end is not None and self.trainer.max_steps > end:
            raise ValueError(
                f"trainer.max_steps is {self.trainer.max_steps} and the schedule of the learning rate ends at {end}; "
                "set model.lr_scheduler.init_args.total_steps to as many."
            )
        steps, callbacks = self.trainer.max_steps, self.trainer.checkpoint_callbacks
        intervals = [getattr(callback, "_every_n_train_steps", 0) for callback in callbacks]
        if steps > 0 and intervals and all(every and steps % every for every in intervals):
            last = max(steps // every * every for every in intervals)
            if last:  # a run without any multiple is saved when it ends
                rank_zero_warn(
                    f"The last checkpoint will be of step {last} of {steps}; set every_n_train_steps of "
                    "ModelCheckpoint to a divisor."
                )

    def _look_for_weights(self) -> None:
        if self.config[self.subcommand].get("ckpt_path") is None and not self.model.provenance:
            rank_zero_warn(
                "There is no --ckpt_path, so the network has the weights that it was made with, which are random "
                "unless its class loads some."
            )

    before_validate = before_predict = _look_for_weights

    def before_test(self) -> None:
        """Measure what the config's ``evaluation`` says, and print no table beside that of the evaluation."""
        self._look_for_weights()
        if self._evaluation is not None:
            parser = ArgumentParser()
            parser.add_subclass_arguments(FIDEvaluation, "evaluation")
            evaluation = parser.instantiate(Namespace(evaluation=self._evaluation)).evaluation
            # In place of the run's own, which measures during ``fit``: two would set the same model's times and seeds.
            others = [c for c in self.trainer.callbacks if not isinstance(c, FIDEvaluation)]
            self.trainer.callbacks = [*others, evaluation]
        if any(isinstance(callback, FIDEvaluation) for callback in self.trainer.callbacks):
            self.config_init[self.subcommand]["verbose"] = False
        else:
            rank_zero_warn("This test measures nothing; give it --evaluation=configs/evaluation/<data>.yaml.")

    def after_instantiate_classes(self) -> None:
        """Make checkpoints self-contained: they carry the config from which ``load_from_checkpoint`` rebuilds."""
        config = yaml.safe_load(self.parser.dump(self.config))
        model = (config[self.subcommand] if self.subcommand else config)["model"]
        self.model.save_hyperparameters(
            {
                **model.get("init_args", {}),
                "_class_path": model["class_path"],
                "_instantiator": "lightning.pytorch.cli.instantiate_module",
            }
        )

    def _parse_ckpt_path(self) -> None:
        # Lightning lets a checkpoint's hyperparameters override the command line here, silently (lightning#21455).
        path = self.config[self.config.subcommand].get("ckpt_path") if self.config.get("subcommand") else None
        if path and path not in ("best", "last", "hpc") and not Path(path).is_dir():
            read_checkpoint(path)  # which says it in a sentence if it is none


def main(args: ArgsType = None) -> None:
    """Run a command; what our own code refuses is printed as a sentence, without traceback.

    Set ``SCLIGHTNING_TRACEBACK=1`` for the traceback. Anything that we did not raise ourselves is a bug and keeps its
    own.
    """
    _quieten()
    arguments = sys.argv[1:] if args is None else args
    command = arguments[0] if isinstance(arguments, list) and arguments else None
    try:
        if command in COMMANDS:
            module, function = COMMANDS[command]
            function = getattr(importlib.import_module(module), function)
            auto_cli(function, args=arguments[1:], prog=f"sclightning {command}", exit_on_error=False)
        else:
            SCLightningCLI(args if arguments else ["--help"])
    except Exception as error:
        sentence = None if os.environ.get("SCLIGHTNING_TRACEBACK") else _sentence(error)
        if sentence is None:
            raise
        print(f"\nsclightning: error: {sentence}", file=sys.stderr)
        sys.exit(2)


def _quieten() -> None:
    """Keep off the screen what no user of the command can act upon."""
    warnings.filterwarnings("ignore", message=".*LeafSpec")  # Lightning calling torch
    warnings.filterwarnings("ignore", message=".*torch.jit.script")  # torch.func.jvp calling torch
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training")  # the frozen teacher
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(lambda record: "Tip:" not in record.msg)


def _sentence(error: BaseException | None) -> str | None:
    """What to tell the user: the first error in the chain of causes that was written for one."""
    misled = False
    while error is not None:
        if "Config file loop detected" in str(error) and (cause := error.__cause__ or error.__context__):
            misled, error = True, cause  # jsonargparse says so of any mistake in the file of a part
            continue
        if isinstance(error, argparse.ArgumentError) or misled:
            # jsonargparse lists every type that a value is not; the line that helps says neither of these.
            noise = r"\s*(Does not validate|Subtypes:|Errors:|- Expected a <class 'NoneType'>|Given value)"
            lines = [line for line in str(error).splitlines() if line.strip() and not re.match(noise, line)]
            return " ".join(line.strip().removeprefix("- ") for line in lines)
        frames, package = traceback.extract_tb(error.__traceback__)[-1:], Path(__file__).parent
        ours = any(Path(f.filename).is_relative_to(package) and f.line.startswith("raise") for f in frames)
        if ours or isinstance(error, MisconfigurationException):
            return str(error)
        error = error.__cause__ or error.__context__
    return None


if __name__ == "__main__":
    main()
