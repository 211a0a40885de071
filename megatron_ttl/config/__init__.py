"""Settings: the run file (TOML), the machine profile (DeepSpeed JSON), the rules between them. No torch."""
