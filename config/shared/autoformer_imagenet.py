# How AutoFormer was trained on ImageNet: 1,024 images a step, AdamW, strong augmentation.
dataset = 'imagenet'
batch_size = 129 # 43 images, three times each
gradient_accumulation_steps = 8
flip = True
resized_crop = 0.08
rand_augment = 9
random_erasing = 0.25
repeated_augmentation = 3
label_smoothing = 0.1
mixup = 0.8
cutmix = 1.0
learning_rate = 1e-3
min_lr = 1e-5
weight_decay = 0.05
beta2 = 0.999
grad_clip = 0.0
