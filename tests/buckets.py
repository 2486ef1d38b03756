"""An object store in memory, behind s3://: no directories, no renaming, and stale listings."""

import io

import fsspec


class Objects(fsspec.AbstractFileSystem):
    """One bucket, named "bucket"; what is in it belongs to the class, as to a service."""

    protocol = "s3"
    cachable = False
    held = {}
    forbids = False

    @classmethod
    def _strip_protocol(cls, path):
        return str(path).removeprefix("s3://").rstrip("/")

    def _check(self, path):
        if self.forbids:
            raise PermissionError("Forbidden")
        return self._strip_protocol(path)

    def ls(self, path, detail=True, **kwargs):
        path = self._check(path)
        if path not in self.dircache:
            found = {}
            for name, data in list(self.held.items()):
                if name.startswith(f"{path}/"):
                    child, _, rest = name.removeprefix(f"{path}/").partition("/")
                    kind = "directory" if rest else "file"
                    size = 0 if rest else len(data)
                    found[child] = {"name": f"{path}/{child}", "type": kind, "size": size}
            if path in self.held:
                found = {"": {"name": path, "type": "file", "size": len(self.held[path])}}
            if not found:
                raise FileNotFoundError(path)
            self.dircache[path] = list(found.values())  # keeps them only if it is to
            return list(found.values()) if detail else [one["name"] for one in found.values()]
        found = self.dircache[path]
        return found if detail else [one["name"] for one in found]

    def info(self, path, **kwargs):
        path = self._check(path)
        if path in self.held:
            return {"name": path, "type": "file", "size": len(self.held[path])}
        self.ls(path)
        return {"name": path, "type": "directory", "size": 0}

    def invalidate_cache(self, path=None):
        self.dircache.clear()

    def mkdir(self, path, **kwargs):
        raise AssertionError("s3fs would make a bucket")

    makedirs = mkdir

    def mv(self, *args, **kwargs):
        raise AssertionError("s3fs fails to rename what it takes for a directory")

    rename = mv

    def rm_file(self, path):
        path = self._check(path)
        if path not in self.held:
            raise FileNotFoundError(path)
        del self.held[path]

    def rm(self, path, recursive=False, maxdepth=None):
        path = self._check(path)
        if not recursive:
            return self.rm_file(path)
        names = [name for name in self.held if name == path or name.startswith(f"{path}/")]
        if not names:
            raise FileNotFoundError(path)
        for name in names:
            del self.held[name]
        return None

    def open(self, path, mode="r", **kwargs):
        path = self._check(path)
        if path.partition("/")[0] != "bucket":
            raise FileNotFoundError(path)
        if "w" in mode:
            raw = _Written(self.held, path)
        elif path in self.held:
            raw = io.BytesIO(self.held[path])
        else:
            raise FileNotFoundError(path)
        return raw if "b" in mode else io.TextIOWrapper(raw)


class _Written(io.BytesIO):
    """Appears when it is closed."""

    def __init__(self, held, path):
        super().__init__()
        self._held, self._path = held, path

    def close(self):
        if not self.closed:
            self._held[self._path] = self.getvalue()
        super().close()
