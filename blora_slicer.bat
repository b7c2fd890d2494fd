@echo off
rem Keeps the content of a B-LoRA as a smaller LoRA: model.safetensors, beside this file.
rem Edit the setting below and run it, or drop one or more LoRA files on it.
rem Options given to it are handed on: blora_slicer --traits style --alphas 0.8
setlocal EnableExtensions DisableDelayedExpansion

rem ---- Settings (edit them here, or set them in the environment) ---------------------------------
rem The LoRA to slice: what a launcher saved. Write / for \.
if not defined BLORA_LORA set "BLORA_LORA=%~dp0_out/lora/sdxl/my_project_1/my_project_1.safetensors"

rem ---- Slice (nothing below needs editing) -------------------------------------------------------
if exist "%~dp0venv\Scripts\activate.bat" (
  call "%~dp0venv\Scripts\activate.bat"
) else if exist "%~dp0.venv\Scripts\activate.bat" (
  call "%~dp0.venv\Scripts\activate.bat"
)

rem Options alone are for the LoRA set above. Files come first, and may have options behind them;
rem several files and nothing else are dropped ones, which give one slice each.
if "%~1"=="" goto the_set_lora
if not exist "%~1" goto the_set_lora
if "%~2"=="" goto given_files
:next_file
shift /1
if "%~1"=="" goto dropped_files
if exist "%~1" goto next_file

:given_files
python "%~dp0blora_slicer.py" --loras %*
goto finish

:dropped_files
python "%~dp0blora_slicer.py" --not_combined --loras %*
goto finish

:the_set_lora
python "%~dp0blora_slicer.py" --loras "%BLORA_LORA%" %*

:finish
set "RC=%ERRORLEVEL%"
rem A double-click or a drop opens a window of its own that closes with the last line: hold it open.
if not defined CMDCMDLINE exit /b %RC%
set CLICKED=%COMSPEC% /c "%~f0" %*
set "CLICKED=%CLICKED:"=%"
set "RUN=%CMDCMDLINE:"=%"
if /i "%RUN%"=="%CLICKED%" pause
exit /b %RC%
