@echo off
rem What the .bat launchers start, with their own path and the options they are given: finds the
rem training's environment, and goes on in its Python (launch.py), which reads the launcher.
setlocal EnableExtensions DisableDelayedExpansion

set "RC=1"
cd /d "%~dp0.."
if not exist sdxl_train_network.py if not exist sd-scripts\sdxl_train_network.py (
  echo No sdxl_train_network.py in "%CD%" or its sd-scripts folder: copy the B-LoRA files into a kohya sd-scripts or kohya_ss folder.>&2
  goto finish
)

set "VENV="
if exist ".venv\Scripts\accelerate.exe" set "VENV=%CD%\.venv"
if exist "venv\Scripts\accelerate.exe" set "VENV=%CD%\venv"
if defined VENV set "VIRTUAL_ENV=%VENV%"
if defined VENV set "PATH=%VENV%\Scripts;%PATH%"
for %%I in (accelerate.exe) do set "ACCELERATE=%%~$PATH:I"
if not defined ACCELERATE (
  echo No accelerate in venv, .venv or the active environment: install kohya's requirements, or activate the environment that has them.>&2
  goto finish
)

rem Its Python is beside it in a venv, and one folder up in conda. pip --user puts accelerate into a
rem folder without one.
for %%I in ("%ACCELERATE%\..\python.exe") do set "PYTHON=%%~fI"
if not exist "%PYTHON%" for %%I in ("%ACCELERATE%\..\..\python.exe") do set "PYTHON=%%~fI"
if not exist "%PYTHON%" for %%I in (python.exe) do set "PYTHON=%%~$PATH:I"
if not defined PYTHON (
  echo No Python found that runs "%ACCELERATE%": make its environment again, with kohya's requirements.>&2
  goto finish
)

"%PYTHON%" -m blora.launch %*
set "RC=%ERRORLEVEL%"

:finish
rem A double-click opens a window of its own that closes with the last line: hold it open.
if not defined CMDCMDLINE exit /b %RC%
set "CLICKED=%CMDCMDLINE:"=%"
if /i "%CLICKED%"=="%COMSPEC% /c %~f1 " pause
exit /b %RC%
