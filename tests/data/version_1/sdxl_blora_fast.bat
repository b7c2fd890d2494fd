@echo off
rem Trains content and style of an SDXL B-LoRA together, as classic does, with these changes: it
rem computes only the gradients that a B-LoRA needs (blora_network), caches latents, uses torch's
rem own attention, has no warm-up and no bias correction, and saves in fp16.
rem Edit the settings below, preferably in a copy of this file, and run it.
rem Options given to it are appended last and override the recipe: sdxl_blora_fast --max_train_steps=10
setlocal EnableExtensions DisableDelayedExpansion

rem ---- Settings (edit them here, or set them in the environment) ---------------------------------
rem Change only what is between = and ", and put no spaces around the =. For example:
rem   if not defined BLORA_CHECKPOINT set "BLORA_CHECKPOINT=D:\my models\sdxl.safetensors"
rem Delete the quote marks around a path that you paste: with an & in it, they break the line.
rem Your project. Its dataset config is _in/lora/sdxl/NAME/config.toml.
if not defined BLORA_NAME set "BLORA_NAME=my_project"
rem The attempt. The LoRA is saved as _out/lora/sdxl/NAME_REVISION/NAME_REVISION.safetensors.
if not defined BLORA_REVISION set "BLORA_REVISION=1"
rem Rank and alpha. 1024 saves 0.9 GB in fp16; 64, the paper's, 56 MB, and trains on smaller cards.
if not defined BLORA_RANK set "BLORA_RANK=1024"
rem The SDXL checkpoint to train on: a .safetensors file or a diffusers folder.
if not defined BLORA_CHECKPOINT set "BLORA_CHECKPOINT=path/to/sd_xl_base_1.0.safetensors"
rem The blocks to train: one of lycoris_presets, relative to this folder.
if not defined BLORA_PRESET set "BLORA_PRESET=lycoris_presets/blora_content_style.toml"
rem 1 saves memory by computing part of each step twice. 0 is faster and takes 3 to 4 GB more.
if not defined BLORA_SAVE_MEMORY set "BLORA_SAVE_MEMORY=1"
rem Options for accelerate launch. For two GPUs: --multi_gpu --num_processes=2
rem For one of several: --num_processes=1
if not defined BLORA_ACCELERATE_ARGS set "BLORA_ACCELERATE_ARGS="

rem ---- Launch (nothing below needs editing) ------------------------------------------------------
rem A path copied from Explorer has quote marks, and a \ at its end would swallow the next one. Of an
rem empty setting cmd would make the text "=.
if defined BLORA_CHECKPOINT set "BLORA_CHECKPOINT=%BLORA_CHECKPOINT:"=%"
if defined BLORA_CHECKPOINT set "BLORA_CHECKPOINT=%BLORA_CHECKPOINT:\=/%"
if defined BLORA_PRESET set "BLORA_PRESET=%BLORA_PRESET:"=%"
if defined BLORA_PRESET set "BLORA_PRESET=%BLORA_PRESET:\=/%"
cd /d "%~dp0"
set "PROJECT=%BLORA_NAME%_%BLORA_REVISION%"
set "SCRIPT=sdxl_train_network.py"
if not exist "%SCRIPT%" set "SCRIPT=sd-scripts/sdxl_train_network.py"

set "RC=1"
if not exist "%SCRIPT%" (
  echo No sdxl_train_network.py in "%CD%" or its sd-scripts folder: copy the B-LoRA files into a kohya sd-scripts or kohya_ss folder.>&2
  goto finish
)

rem Lets the trainer of a kohya_ss folder find blora_network.py, which lies here.
if defined PYTHONPATH set "PYTHONPATH=;%PYTHONPATH%"
set "PYTHONPATH=%CD%%PYTHONPATH%"
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

rem Pre-flight looks at the environment of the training, so it runs by the Python of accelerate.
rem It is beside accelerate in a venv, and one folder up in conda. pip --user puts accelerate into
rem a folder without one.
for %%I in ("%ACCELERATE%\..\python.exe") do set "PYTHON=%%~fI"
if not exist "%PYTHON%" for %%I in ("%ACCELERATE%\..\..\python.exe") do set "PYTHON=%%~fI"
if not exist "%PYTHON%" for %%I in (python.exe) do set "PYTHON=%%~$PATH:I"
if not defined PYTHON (
  echo No Python found that runs "%ACCELERATE%": make its environment again, with kohya's requirements.>&2
  goto finish
)

set "CHECKPOINTING="
if "%BLORA_SAVE_MEMORY%"=="1" set "CHECKPOINTING=--gradient_checkpointing"
if not "%BLORA_SAVE_MEMORY%"=="1" if not "%BLORA_SAVE_MEMORY%"=="0" (
  echo BLORA_SAVE_MEMORY is "%BLORA_SAVE_MEMORY%": give 1 to save memory, or 0 to be faster.>&2
  goto finish
)

rem torch refuses to keep workers where --max_data_loader_n_workers=0 leaves none.
set "WORKERS=--persistent_data_loader_workers"
:next_option
rem cmd splits an option at its =, unless there are quote marks around it. One empty text is no end.
if "%~1"=="--max_data_loader_n_workers" if "%~2"=="0" set "WORKERS="
if "%~1"=="--max_data_loader_n_workers=0" set "WORKERS="
shift /1
if not "%~1"=="" goto next_option
if not "%~2"=="" goto next_option

set OPTIONS=^
  --pretrained_model_name_or_path="%BLORA_CHECKPOINT%" ^
  --dataset_config="./_in/lora/sdxl/%BLORA_NAME%/config.toml" ^
  --output_dir="./_out/lora/sdxl/%PROJECT%" ^
  --output_name="%PROJECT%" ^
  --network_module=blora_network ^
  --network_args "preset=%BLORA_PRESET%" ^
  "bypass_mode=True" ^
  --network_dim="%BLORA_RANK%" ^
  --network_alpha="%BLORA_RANK%" ^
  --network_train_unet_only ^
  "--resolution=1024,1024" ^
  --enable_bucket ^
  --min_bucket_reso=512 ^
  --bucket_reso_steps=32 ^
  --cache_latents ^
  --caption_extension=.txt ^
  %WORKERS% ^
  --max_train_steps=3000 ^
  --save_every_n_steps=1000 ^
  --save_model_as=safetensors ^
  --save_precision=fp16 ^
  --mixed_precision=fp16 ^
  --no_half_vae ^
  %CHECKPOINTING% ^
  --sdpa ^
  --prior_loss_weight=0 ^
  --max_grad_norm=1.0 ^
  --seed=0 ^
  --lr_scheduler=cosine ^
  --lr_warmup_steps=0 ^
  --learning_rate=1.0 ^
  --optimizer_type=prodigy ^
  --optimizer_args ^
  "weight_decay=1e-04" ^
  "betas=(0.9,0.999)" ^
  "eps=1e-08" ^
  "decouple=True" ^
  "use_bias_correction=False" ^
  "safeguard_warmup=True" ^
  "beta3=None"

"%PYTHON%" blora_preflight.py launch --num_cpu_threads_per_process=8 %BLORA_ACCELERATE_ARGS% "%SCRIPT%" %OPTIONS% %*
set "RC=%ERRORLEVEL%"
if not "%RC%"=="0" goto finish
"%ACCELERATE%" launch --num_cpu_threads_per_process=8 %BLORA_ACCELERATE_ARGS% "%SCRIPT%" %OPTIONS% %*
set "RC=%ERRORLEVEL%"

:finish
rem A double-click opens a window of its own that closes with the last line: hold it open.
if not defined CMDCMDLINE exit /b %RC%
set "CLICKED=%CMDCMDLINE:"=%"
if /i "%CLICKED%"=="%COMSPEC% /c %~f0 " pause
exit /b %RC%
