"""The hand-off artifact: an ordinary Hugging Face folder with a manifest that proves it."""

from common_platform.artifact.manifest import FileEntry, Manifest, Probe, read_manifest, verify
from common_platform.artifact.probes import check_probes
from common_platform.artifact.reader import ModelFolder, open_model_folder
from common_platform.artifact.writer import ArtifactWriter

__all__ = [
    "ArtifactWriter",
    "FileEntry",
    "Manifest",
    "ModelFolder",
    "Probe",
    "check_probes",
    "open_model_folder",
    "read_manifest",
    "verify",
]
