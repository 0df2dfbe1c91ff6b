"""The YAML configurations that ship with lightning-kd; ``lightning-kd list`` names them."""
