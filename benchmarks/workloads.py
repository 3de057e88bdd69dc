"""Problem sizes of the weighted cross-entropy by name, shared by tests and benchmarks. No arrays are made here."""

import math
from dataclasses import dataclass, replace

ACCELERATOR_LOGITS = 2**28  # 1 GiB in float32: beyond every cache, and long beside the launch of a kernel


@dataclass(frozen=True)
class Workload:
    """Logits of shape `[rows, classes]`, or `[members, rows, classes]` with class weights for each member.

    **Fields:**

    - `name`: what tables and test ids call it.
    - `rows`: examples, of each member if there are members.
    - `classes`: classes of an example.
    - `members`: members of the ensemble that the loss is vmapped over; `None` if there is no such axis.
    - `dtypes`: dtypes of the logits by name.
    - `grows`: whether an accelerator gets more rows. Not if the very smallness is the question.
    """

    name: str
    rows: int
    classes: int
    members: int | None = None
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    grows: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape of the labels."""
        return (self.rows,) if self.members is None else (self.members, self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the logits."""
        return (*self.batch, self.classes)

    @property
    def num_logits(self) -> int:
        return math.prod(self.shape)

    @property
    def small(self) -> "Workload":
        """A few rows of as many classes: the classes decide which code runs, the rows how long it takes."""
        return replace(self, rows=min(self.rows, 3))

    def on(self, platform: str) -> "Workload":
        """The size for a platform: as it is for `"cpu"`, else an odd multiple of the rows, about 2²⁸ logits in all."""
        if platform == "cpu" or not self.grows:
            return self
        return replace(self, rows=self.rows * (max(1, ACCELERATOR_LOGITS // self.num_logits) - 1 | 1))


CIFAR_ENSEMBLE = Workload("cifar-ensemble", rows=512, classes=10, members=8, grows=False)
CIFAR_ROWS = Workload("cifar-rows", rows=65536, classes=10)
IMAGENET = Workload("imagenet", rows=4096, classes=1000)
VOCAB_32K = Workload("vocab-32k", rows=512, classes=32768)
VOCAB_GPT2 = Workload("vocab-gpt2", rows=256, classes=50257)
VOCAB_128K = Workload("vocab-128k", rows=128, classes=128256)
VOCAB_256K = Workload("vocab-256k", rows=64, classes=262144)
ODD_3 = Workload("odd-3", rows=777, classes=3)
ODD_1001 = Workload("odd-1001", rows=1023, classes=1001)
ODD_GPT2 = Workload("odd-gpt2", rows=129, classes=50257)

WORKLOADS = (
    CIFAR_ENSEMBLE,
    CIFAR_ROWS,
    IMAGENET,
    VOCAB_32K,
    VOCAB_GPT2,
    VOCAB_128K,
    VOCAB_256K,
    ODD_3,
    ODD_1001,
    ODD_GPT2,
)
