@echo off
rem Keeps the content of a B-LoRA as a smaller LoRA: model.safetensors, beside this file.
rem Edit the setting below and run it, or drop one or more LoRA files on it.
rem Options given to it are passed on: blora_slicer --traits style --alphas 0.8
setlocal EnableExtensions DisableDelayedExpansion

rem ---- Settings (edit them here, or set them in the environment) ---------------------------------
rem The LoRA to slice: what a launcher saved. Change only what is between = and ".
if not defined BLORA_LORA set "BLORA_LORA=%~dp0_out/lora/sdxl/my_project_1/my_project_1.safetensors"

rem ---- Slice (nothing below needs editing) -------------------------------------------------------
if defined BLORA_LORA set "BLORA_LORA=%BLORA_LORA:"=%"
set "VENV="
if exist "%~dp0.venv\Scripts\accelerate.exe" set "VENV=%~dp0.venv"
if exist "%~dp0venv\Scripts\accelerate.exe" set "VENV=%~dp0venv"
if defined VENV set "VIRTUAL_ENV=%VENV%"
if defined VENV set "PATH=%VENV%\Scripts;%PATH%"
set "RC=1"
for %%I in (python.exe) do set "PYTHON=%%~$PATH:I"
if not defined PYTHON (
  echo No python in venv, .venv or the active environment: install kohya's requirements, or activate the environment that has them.>&2
  goto finish
)

rem Options alone apply to the LoRA set above. Files come first, and options may follow them;
rem several files and nothing else were dropped here, and give one slice per file.
set "FIRST=%~1"
if not defined FIRST goto the_set_lora
if "%FIRST:~0,1%"=="-" goto the_set_lora
if not exist "%~1" goto given_files
if "%~2"=="" goto given_files
:next_file
shift /1
if "%~1"=="" goto dropped_files
if exist "%~1" goto next_file

:given_files
"%PYTHON%" "%~dp0blora_slicer.py" --loras %*
goto sliced

:dropped_files
"%PYTHON%" "%~dp0blora_slicer.py" --not_combined --loras %*
goto sliced

:the_set_lora
"%PYTHON%" "%~dp0blora_slicer.py" --loras "%BLORA_LORA%" %*

:sliced
set "RC=%ERRORLEVEL%"

:finish
rem A double-click or a drop opens a window that closes with the last line: hold it open.
if not defined CMDCMDLINE exit /b %RC%
set CLICKED=%COMSPEC% /c "%~f0" %*
set "CLICKED=%CLICKED:"=%"
set "RUN=%CMDCMDLINE:"=%"
if /i "%RUN%"=="%CLICKED%" pause
exit /b %RC%
