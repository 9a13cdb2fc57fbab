"""Configuration files: data sets, trainings, trainers, fusions, experiments."""

from pathlib import Path

#: Where they are installed.
FOLDER = Path(__file__).parent
