"""What the package keeps in memory beyond tensors that the user sees, and what it costs."""

from .workspace import WORKSPACE, Workspace, WorkspaceState, release_workspace, workspace

__all__ = ["WORKSPACE", "Workspace", "WorkspaceState", "release_workspace", "workspace"]
