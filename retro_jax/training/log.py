"""What the host does with the metrics of a step: judges it, tells of it, writes it; always one step behind the device.

The metrics of step n are fetched after step n + 1 is dispatched, so the device never waits for the host.
"""

import sys
from collections.abc import Callable

import jax
import numpy as np

from retro_jax.config import TrainConfig
from retro_jax.data.batches import Batches
from retro_jax.errors import UserError
from retro_jax.training.flops import hardware_flops, peak_flops, processed_tokens, step_flops
from retro_jax.training.goodput import Ledger
from retro_jax.training.metrics import MetricsWriter
from retro_jax.training.optimizer import learning_rate


class StepLog:
    """Metrics of the step in flight, resolved once the next one is dispatched.

    Attributes:
      last_loss: of the newest resolved step, nats per token.
      tokens_per_second: scored target tokens, since the last line.
    """

    def __init__(
        self,
        config: TrainConfig,
        batches: Batches,
        ledger: Ledger,
        writer: MetricsWriter | None,
        latest_checkpoint: Callable[[], int | None],
    ) -> None:
        """Works out what does not change from step to step.

        Args:
          config: the run, with its length.
          batches: the order of examples, to name those of a bad step.
          ledger: the clock of the run.
          writer: of the lines; None in a process that is not the first.
          latest_checkpoint: waits for the save in progress and gives the newest complete step, for the message of the
            step that stops the run.
        """
        self._config = config
        self._batches = batches
        self._ledger = ledger
        self._writer = writer
        self._latest_checkpoint = latest_checkpoint
        # All at once: a schedule asked step by step would queue behind the steps on the device.
        self._rates = np.asarray(learning_rate(config.optimizer, config.steps)(np.arange(config.steps)))
        self._flops, self._hardware_flops = step_flops(config), hardware_flops(config)
        peak = peak_flops(jax.devices()[0].device_kind, config.model.dtype)
        self._peak = None if peak is None else peak * jax.device_count()
        self._processed_tokens = processed_tokens(config)
        self._pending: tuple[int, dict[str, jax.Array]] | None = None
        self._tokens = 0.0
        self._steps = 0
        self.last_loss = float("nan")
        self.tokens_per_second = 0.0

    def push(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that was dispatched."""
        self._pending = (step, metrics)

    def resolve(self) -> None:
        """Waits for the pending step and fetches its metrics; writes a line every `log_every` steps.

        Raises:
          UserError: one bad step too many in a row.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        self.last_loss = values["loss"]
        if values["bad"]:
            self._report_bad(step, values)
        self._steps += 1
        self._tokens += values["tokens"]
        if step % self._config.log_every == 0 or step == self._config.steps:
            self._write(step, values)

    def write_validation(self, step: int, losses: dict[str, float]) -> None:
        """A line of its own."""
        if self._writer is not None:
            self._writer.write(step, losses)

    def _write(self, step: int, values: dict[str, float]) -> None:
        spent = self._ledger.enter(step)
        seconds = max(spent["step"] + spent.get("data", 0.0), 1e-9)  # without validation and saving
        self.tokens_per_second = self._tokens / seconds
        line = {
            "loss": values["loss"],
            "gradient_norm": values["gradient_norm"],
            "learning_rate": float(self._rates[step - 1 - int(values["skipped"] - values["bad"])]),
            "examples_seen": step * self._config.batch_size,
            "skipped_steps": values["skipped"],
            "bad_steps_in_a_row": values["bad_in_a_row"],
            "tokens_per_second": self.tokens_per_second,
            "processed_tokens_per_second": self._processed_tokens * self._steps / seconds,
            "model_tflops_per_second": self._flops * self._steps / seconds / 1e12,
            "hardware_tflops_per_second": self._hardware_flops * self._steps / seconds / 1e12,
            "data_wait_seconds": spent.get("data", 0.0) / self._steps,
        }
        if self._peak is not None:
            line["mfu"] = self._flops * self._steps / seconds / self._peak
        if self._writer is not None:
            self._writer.write(step, line)
        self._tokens, self._steps = 0.0, 0

    def _report_bad(self, step: int, values: dict[str, float]) -> None:
        first = (step - 1) * self._config.batch_size
        origins = [self._batches.origin(first + row) for row in range(self._config.batch_size)]
        records = ", ".join(f"{self._config.data.sequences[origin.source]}:{origin.index}" for origin in origins)
        what = (
            f"step {step}: loss {values['loss']}, gradient norm {values['gradient_norm']}; the batch was examples "
            f"{first} to {first + self._config.batch_size - 1}: records {records}"
        )
        if values["bad_in_a_row"] > self._config.stability.max_bad_steps:
            good = self._latest_checkpoint()
            raise UserError(
                f"{what}; last good checkpoint: {'none' if good is None else f'step {good}'}; "
                f"lower optimizer.peak_learning_rate or look at this batch"
            )
        if self._writer is not None:
            print(f"{what}; skipped, number {values['bad_in_a_row']:.0f} in a row", file=sys.stderr, flush=True)
