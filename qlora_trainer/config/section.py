"""What every section of the run file shares."""

from pydantic import BaseModel, ConfigDict


class Settings(BaseModel):
    """No unknown keys, no coercion, no change after reading."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=()
    )
