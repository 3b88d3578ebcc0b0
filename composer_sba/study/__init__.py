"""The paper's experiments and comparisons with other methods: ``python -m composer_sba.study --help``."""
