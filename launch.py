"""Train a vision-language-action policy by RL inside a learned world model.

python launch.py --config=configs/grpo.py
python launch.py --config=configs/ppo.py --config.train.iterations=2
python launch.py --config=configs/grpo.py --mode=eval --config.checkpoint.restore=latest
python launch.py --mode=export --config.policy.checkpoint=RUN --export_dir=NEW_FOLDER
python launch.py --mode=serve --config.policy.checkpoint=RUN
"""

import importlib
import os
import shlex
import signal
import sys

# Before JAX is imported: its own log lines and its grip on the whole GPU are not wanted.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

from absl import app, flags, logging
from ml_collections import config_flags

from evac_jax.config.build import from_config_dict
from evac_jax.config.checks import validate, validate_serving
from evac_jax.config.flags import DEFAULT_PRESET, arguments, check_flags, parse, resolved
from evac_jax.config.paths import INPUT_PATHS, RUN_PATHS, WORDS, WORLD, with_absolute
from evac_jax.config.reference import help_text
from evac_jax.config.schema import TrainConfig
from evac_jax.errors import ConfigError, EvacJaxError, StoppedError

_MODE = flags.DEFINE_enum(
    "mode", "train", ["train", "eval", "collect", "export", "serve"], "What to do."
)
_EXPORT_DIR = flags.DEFINE_string(
    "export_dir", "", "New folder for --mode=export of the run or policy in policy.checkpoint."
)


def main(argv: list[str]) -> None:
    """Resolve the configuration and hand over."""
    if len(argv) > 1:
        raise ConfigError(f"expected flags alone, such as --config.seed=1, got {argv[1:]}")
    logging.set_verbosity(logging.INFO)
    preset = flags.FLAGS["config"]
    check = validate_serving if _MODE.value == "serve" else validate
    config = from_config_dict(resolved(preset).to_dict(), check)
    elsewhere = config.cluster.engine == "ray"  # its trainers begin in folders of their own
    config = with_absolute(config, RUN_PATHS + (*INPUT_PATHS, WORLD) * elsewhere)
    logging.info("%s %s with the preset %s", _MODE.value, config.algorithm, preset.config_filename)
    if (_MODE.value == "export") != bool(_EXPORT_DIR.value):
        raise ConfigError("--export_dir: --mode=export needs a new folder, other modes take none")
    if _MODE.value in ("train", "eval"):
        resumed = _MODE.value == "train" and config.checkpoint.restore not in WORDS
        _announce(config, config.checkpoint.restore if resumed else config.log.dir)
    if config.cluster.engine == "ray" and _MODE.value in ("train", "eval"):
        importlib.import_module("evac_jax.ray_cluster").run(config, _MODE.value)
        return
    # Imported only after the configuration is known to be good: it takes seconds.
    module, function = {
        "train": ("evac_jax.train", "run"),
        "eval": ("evac_jax.train", "evaluate_only"),
        "collect": ("evac_jax.tools.episodes.collect", "run"),
        "export": ("evac_jax.tools.policy.export", "run"),
        "serve": ("evac_jax.serve.run", "run"),
    }[_MODE.value]
    more = {"export_dir": _EXPORT_DIR.value} if _EXPORT_DIR.value else {}
    getattr(importlib.import_module(module), function)(config, **more)


def _announce(config: TrainConfig, place: str) -> None:
    """Tell at once where the run will write and how to watch it; all else waits for JAX."""
    logging.info("it writes below %s", place)
    if config.log.tensorboard:
        watch = [sys.executable, "-m", "tensorboard.main", f"--logdir={place}"]
        logging.info("curves while it runs: %s", shlex.join(watch))
    logging.info("loading JAX, which takes seconds")


def cli() -> None:
    """Run `main`; a user's mistake ends with one message and status 2, without a traceback.

    A run that a signal ended has status 128 + its number.
    """
    global __doc__  # what absl's --help begins with
    try:
        argv = [sys.argv[0], *arguments(sys.argv[1:])]
        check_flags(argv[1:])
        __doc__ += help_text(argv[1:])
        # Only now, because this reads the command line and breaks off at a field that is unknown.
        config_flags.DEFINE_config_file(
            "config",
            DEFAULT_PRESET,
            "Preset file, with a preset after a colon.",
            sys_argv=argv,
        )
        app.run(main, argv, flags_parser=parse)
    except EvacJaxError as error:
        sys.stderr.write(f"\n{type(error).__name__}: {error}\n")
        if isinstance(error, StoppedError):
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(128 + error.signal)  # a usual exit waits for compilations and other hosts
        sys.exit(2)
    except KeyboardInterrupt:  # before a run began
        os._exit(128 + signal.SIGINT)


if __name__ == "__main__":
    cli()
