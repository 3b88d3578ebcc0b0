"""The paper's experiments and its rivals: ``python -m composer_sba.study --help``."""
