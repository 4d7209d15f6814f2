"""Put the compiled modules into the wheel; without a C compiler the wheel is made without them."""

from __future__ import annotations

import importlib.util
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompiledModules(BuildHookInterface):  # type: ignore[type-arg]
    """Called by hatchling before it makes a wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, unless this is an editable install (scripts/setup does that) or the interpreter has no GIL."""
        if version == "editable" or sysconfig.get_config_var("Py_GIL_DISABLED"):
            return
        path = Path(self.root) / "speed" / "build.py"
        spec = importlib.util.spec_from_file_location("sharedpool_build", path)
        assert spec is not None and spec.loader is not None
        speed = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(speed)
        try:
            files = speed.build(Path(self.directory) / "compiled")
        except (Exception, SystemExit) as error:  # no compiler, no headers: setuptools has no one error for it
            self.app.display_warning(f"sharedpool is installed without its compiled modules: {error!r}")
            return
        build_data["pure_python"] = False
        build_data["infer_tag"] = True
        build_data["force_include"].update({str(file): f"sharedpool/compiled/{file.name}" for file in files})
