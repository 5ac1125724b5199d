"""The GPUs of this machine through NVML: energy, power, clocks, memory; and what they are.

Values are as NVML gives them, with its unit in the name. Energy is a counter that misses nothing;
power is a sample and does. It needs the extra `gpu` (nvidia-ml-py) and NVIDIA's driver.
"""

import importlib.util
import json
from collections.abc import Callable
from typing import Any

from tokentape.traces.errors import UsageError
from tokentape.traces.pages import PageError, Sample

SOURCE = "nvml"


def check_installed() -> None:
    """UsageError where the library is not there."""
    if importlib.util.find_spec("pynvml") is None:
        raise UsageError("--gpu: needs nvidia-ml-py: pip install 'tokentape[gpu]'")


class Gpus:
    """All GPUs that the driver shows."""

    source = SOURCE

    def __init__(self) -> None:
        """PageError where there is no driver or no GPU."""
        import pynvml  # noqa: PLC0415 - an extra

        self._nvml: Any = pynvml
        try:
            pynvml.nvmlInit()
            count = pynvml.nvmlDeviceGetCount()
            self._devices = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(count)]
        except pynvml.NVMLError as error:
            raise PageError(f"is not there ({error})") from None
        if not self._devices:
            raise PageError("shows no GPU")
        self._labels = [
            json.dumps({"gpu": str(i), "uuid": _text(self._ask("UUID", device))})
            for i, device in enumerate(self._devices)
        ]

    def facts(self) -> dict[str, str]:
        """Name, count, driver and power cap; of different GPUs, each name."""
        names = sorted({_text(self._ask("Name", d)) for d in self._devices})
        caps = [self._ask("EnforcedPowerLimit", d) for d in self._devices]
        watts = sorted({f"{cap / 1000:g}" for cap in caps if cap is not None})
        found = {"gpu": " + ".join(names), "gpus": str(len(self._devices))}
        found["driver"] = _text(self._nvml.nvmlSystemGetDriverVersion())
        return found | ({"power_cap_w": "/".join(watts)} if watts else {})

    def read(self) -> list[Sample]:
        """What each GPU says now; what one does not say is left out."""
        found: list[Sample] = []
        for device, labels in zip(self._devices, self._labels, strict=True):
            for name, value in self._values(device):
                if value is not None:
                    found.append((name, labels, float(value)))
        if not found:
            raise PageError("says nothing any more")
        return found

    def _values(self, device: Any) -> list[tuple[str, float | None]]:
        nvml = self._nvml
        memory = self._ask("MemoryInfo", device)
        used = self._ask("UtilizationRates", device)
        return [
            ("nvml_total_energy_consumption_mj", self._ask("TotalEnergyConsumption", device)),
            ("nvml_power_usage_mw", self._ask("PowerUsage", device)),
            ("nvml_enforced_power_limit_mw", self._ask("EnforcedPowerLimit", device)),
            ("nvml_clock_sm_mhz", self._ask("ClockInfo", device, nvml.NVML_CLOCK_SM)),
            ("nvml_clock_memory_mhz", self._ask("ClockInfo", device, nvml.NVML_CLOCK_MEM)),
            ("nvml_memory_used_bytes", memory.used if memory else None),
            ("nvml_memory_total_bytes", memory.total if memory else None),
            ("nvml_utilization_gpu_percent", used.gpu if used else None),
            (
                "nvml_temperature_celsius",
                self._ask("Temperature", device, nvml.NVML_TEMPERATURE_GPU),
            ),
            ("nvml_clocks_event_reasons", self._ask("CurrentClocksThrottleReasons", device)),
        ]

    def _ask(self, what: str, device: Any, *more: Any) -> Any:
        """What a GPU says to one question; None where it cannot say."""
        question: Callable[..., Any] = getattr(self._nvml, f"nvmlDeviceGet{what}")
        try:
            return question(device, *more)
        except self._nvml.NVMLError:
            return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
